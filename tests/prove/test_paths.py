"""Attention: the proof holds, and is broken where documents of a row see each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora.batch import Batch
from qlora.data.chat import TokenRow
from qlora.data.loader import collate
from qlora.data.token_cache import PreparedSplit
from qlora.prove import paths
from tests.prove.cases import broken, holds


def as_one_document(split: PreparedSplit, packs: Sequence[tuple[int, ...]], pad_id: int, max_length: int) -> Batch:
    """What a leak looks like: the row's documents are one, and its tokens see all that come before them."""
    rows = [[split.rows[row] for row in members] for members in packs]
    joined = [
        TokenRow([id_ for row in parts for id_ in row.input_ids], [w for row in parts for w in row.loss_weights])
        for parts in rows
    ]
    lengths = [len(row.input_ids) for row in joined]
    whole = PreparedSplit(joined, lengths, lengths, [""] * len(joined), [0] * len(joined))
    return collate(whole, [(number,) for number in range(len(joined))], pad_id, max_length)


def test_it_holds_and_a_leak_breaks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = holds(paths.PROOF, tmp_path).measured
    assert {"a mask, packed", "one by one, packed", "layers kept, packed", "chosen"} <= set(measured)
    assert {f"{name} is not here" for name in ("varlen", "efficient")} <= set(measured)  # a CPU has no such kernels
    monkeypatch.setattr(paths, "collate", as_one_document)
    outcome = broken(paths.PROOF, tmp_path)
    assert float(outcome.measured["a mask, packed"] or 0) > 3 * paths.TOLERANCE
    assert float(outcome.measured["a mask, one document a row"] or 0) < paths.TOLERANCE
