"""Two short rows of a split, to ask a model about: whole ones where there are, else the beginnings of longer ones."""

from __future__ import annotations

from qlora.data.chat import TokenRow
from qlora.data.token_cache import PreparedSplit


def two_short_rows(split: PreparedSplit, most: int) -> PreparedSplit | None:
    """The longest two of the rows of up to `most` tokens, else the shortest two, cut there; None where there are none.

    Rows without a trained token are passed over. The beginning of a row is a row, in which every token is trained: an
    answer may begin later.
    """
    trained = [i for i in sorted(range(len(split.lengths)), key=lambda i: split.lengths[i]) if split.trained[i]]
    short = [i for i in trained if split.lengths[i] <= most][-2:]
    chosen = short if len(short) == 2 else trained[:2]
    if len(chosen) < 2:
        return None
    rows = [_cut(split.rows[i], most) for i in chosen]
    lengths = [len(row.input_ids) for row in rows]
    counts = [sum(weight != 0 for weight in row.loss_weights[1:]) for row in rows]
    return PreparedSplit(rows, lengths, counts, [split.wheres[i] for i in chosen], [split.sources[i] for i in chosen])


def _cut(row: TokenRow, most: int) -> TokenRow:
    if len(row.input_ids) <= most:
        return row
    return TokenRow(list(row.input_ids[:most]), [0.0] + [1.0] * (most - 1))
