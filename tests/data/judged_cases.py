"""Splits of answers to be compared, without any text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qlora.data.chat import TokenRow
from qlora.data.token_cache import Preference, PreparedSplit


def judged_split(
    pairs: Sequence[tuple[int, int, int]], paired: bool = True, together: bool = True, seed: int = 0
) -> PreparedSplit:
    """Of each pair the tokens of its question, of its better and of its worse answer; tokens of 4 to 99.

    A better answer has weights of 1, a worse one of -1, as rows of tokens have them.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randint(4, 100, (count,), generator=generator).tolist()  # noqa: E731
    rows = []
    for asked, better, worse in pairs:
        question = draw(asked)
        for count, sign in ((better, 1.0), (worse, -1.0)):
            rows.append(TokenRow([*question, *draw(count)], [*[0.0] * asked, *[sign] * count]))
    lengths = [len(row.input_ids) for row in rows]
    trained = [sum(weight != 0 for weight in row.loss_weights) for row in rows]
    wheres = [f"a.jsonl:{number // 2 + 1}" for number in range(len(rows))]
    split = PreparedSplit(rows, lengths, trained, wheres, [0] * len(rows))
    return replace(split, preference=Preference(paired, together))
