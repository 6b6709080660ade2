"""Figures of a page as people read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.report import run_sections
from qlora.report.run_files import events_of, run_of
from qlora.report.run_sections import big, figure, percent, seconds, state
from tests.report.runs_told import end, line, start, step, write

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (NAN, "not a number"),
        (-INFINITE, "infinite"),
        (0.01234, "0.0123"),
        (0, "0.0000"),
        (1e-7, "1.00e-07"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_shares_times_and_large_numbers() -> None:
    assert (percent(0.915), percent(None), percent(NAN)) == ("91.5 %", "", "not a number")
    assert (big(12_345), big(0.5), big(3e9), big(1e300)) == ("12.3k", "0.5", "3G", "1e+300")
    assert (seconds(3700), seconds(1e300), seconds(INFINITE)) == ("1 h 01 min", "unknown", "unknown")


def test_how_a_run_stands(tmp_path: Path) -> None:
    told = []
    for number, (lines, under_way) in enumerate(
        (([start(), step(7)], True), ([start(), step(7)], False), ([end(3, 7)], False))
    ):
        folder = write(tmp_path / str(number), lines)
        told.append(state(run_of(folder, "r", events_of(folder), under_way)))
    assert told == ["under way at step 7", "no end recorded at step 7: killed, or stopped by an error", "finished"]


def test_the_peak_is_the_largest_that_was_told(tmp_path: Path) -> None:
    folder = write(tmp_path, [start(), step(1, peak_bytes=9), step(2, peak_bytes=NAN), end(4, 2, peak_bytes=7)])
    assert run_sections.measured_peak(run_of(folder, "r", events_of(folder))) == 9


def test_best_and_median_are_of_finite_numbers(tmp_path: Path) -> None:
    rates = [NAN, 30.0, NAN, 10.0, 20.0]
    steps = [step(number, tokens_per_second=rate) for number, rate in enumerate(rates, 1)]
    told = [line("eval", step=at, loss=loss, rows=1) for at, loss in ((1, NAN), (2, 0.75), (3, 0.5), (4, INFINITE))]
    log = events_of(write(tmp_path / "a", [start(), *steps, *told])).log
    assert (run_sections.best_loss(log), run_sections.median_rate(log)) == (0.5, 20.0)
    log = events_of(write(tmp_path / "b", [start(), step(1, tokens_per_second=NAN), told[0]])).log
    assert figure(run_sections.best_loss(log)) == "not a number" and run_sections.median_rate(log) is None
