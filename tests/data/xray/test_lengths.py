"""Bars of rows by their tokens, with the limit among them."""

from __future__ import annotations

from qlora.data.row_cache import RowReport
from qlora.data.xray.lengths import fill_of, histogram


def test_every_row_stands_in_one_bar() -> None:
    report = RowReport(long_lengths=[101, 150, 151, 390, 5000], cut=2)
    report.end_source(100)
    bars = histogram([1, 7, 8, 100, 100], 100, [report])
    assert [(bar.least, bar.most) for bar in bars[:2]] == [(1, 7), (8, 14)]
    assert bars[14].most == 100 and bars[14].rows == 2 and bars[0].rows == 2
    over = [(bar.least, bar.most, bar.rows) for bar in bars if bar.over]
    assert over == [(101, 150, 2), (151, 200, 1), (201, 400, 1), (401, None, 1)]
    assert sum(bar.rows for bar in bars if not bar.over) == 5


def test_a_limit_of_few_tokens_has_as_many_bars() -> None:
    assert len([bar for bar in histogram([3], 5, []) if not bar.over]) == 5


def test_packs_are_so_full() -> None:
    assert fill_of(True, [(0, 1), (2,)], 150, 100).share == 0.75
