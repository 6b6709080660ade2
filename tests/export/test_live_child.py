"""What the child keeps of a row, and when it must begin again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from qlora.export.llama_cpp.live_child import Row


class Library:
    """llama.cpp's memory of one row, as far as `Row` uses it."""

    def __init__(self, cuts: bool = True, first: int = 0) -> None:
        self.cuts, self.first = cuts, first
        self.held: list[int] = []

    def llama_get_memory(self, _: Any) -> int:
        return 1

    def llama_memory_seq_pos_min(self, *_: int) -> int:
        return self.first

    def llama_memory_seq_rm(self, _memory: int, _row: int, start: int, _end: int) -> bool:
        self.held = self.held[:start] if self.cuts else self.held
        return self.cuts

    def llama_memory_clear(self, *_: Any) -> None:
        self.held = []


def row_on(library: Library) -> Row:
    def logits(ids: Sequence[int], start: int, wanted: frozenset[int]) -> Iterator[Any]:
        assert start == len(library.held)  # nothing is computed behind what is not there
        library.held += ids
        yield from (np.array([sum(library.held)], dtype=np.float32) for _ in wanted)

    return Row(SimpleNamespace(model=SimpleNamespace(library=library), context=1, logits=logits))


def value(raw: bytes) -> float:
    return float(np.frombuffer(raw, dtype=np.float32)[0])


def test_a_row_grows_and_is_cut_and_begins_anew() -> None:
    row = row_on(library := Library())
    assert row.extended([1, 2, 3], 0, False) == b"" and value(row.extended([4], 3, True)) == 10
    assert value(row.extended([5], 2, True)) == 8 and library.held == [1, 2, 5] and row.goes_on
    assert value(row.extended([7, 8], 0, True)) == 15 and library.held == [7, 8]


def test_what_cannot_go_on_is_forgotten_whole() -> None:
    for library in (Library(cuts=False), Library(first=1)):
        row = row_on(library)
        row.extended([1, 2, 3], 0, False)
        assert row.extended([4], 2, True) == b"" and not row.goes_on and library.held == []
        assert value(row.extended([1, 2, 4], 0, True)) == 7 and row.goes_on
    row = row_on(Library())
    assert row.extended([9], 5, True) == b"" and not row.goes_on  # a gap before it
