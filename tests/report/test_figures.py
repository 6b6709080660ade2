"""Figures are short, in units for people, and fit where they are drawn."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qlora.events import Progress
from qlora.report.console import task_line
from qlora.report.figures import how_far, human_bytes, human_seconds, names_of, sparkline


def test_figures_for_people() -> None:
    assert [human_bytes(n) for n in (12, 2048, 3 << 30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
    assert [human_seconds(n) for n in (5, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]
    assert sparkline([]) == "" and sparkline([1.0]) == "▁"
    assert sparkline([float("nan"), float("inf"), 1.0]) == "▁" and human_seconds(float("nan")) == "unknown"
    assert sparkline([0, 1]) == "▁█" and len(sparkline(list(map(float, range(1000))), 40)) == 40


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (Progress("load", 159285888, 269030016, "B"), "151.9 of 256.6 MiB (59 %)"),
        (Progress("merge", 1 << 20, 3 << 30, "bytes"), "0.0 of 3.0 GiB (0 %)"),
        (Progress("load", 4, 4, "B"), "4 of 4 B (100 %)"),
        (Progress("imatrix", 120, 7000, "tokens"), "120 of 7,000 tokens (2 %)"),
        (Progress("evaluate", 0, 0), "0 of 0 (0 %)"),
    ],
)
def test_progress_counts_in_units_for_people(task: Progress, text: str) -> None:
    assert how_far(task) == text
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(task_line(task))
    assert text in console.export_text()


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert names_of(["/a/x.jsonl", "/b/y.jsonl"]) == ["x.jsonl", "y.jsonl"]
    assert names_of(["/a/b/x.jsonl", "/c/b/x.jsonl", "C:\\d\\x.jsonl"]) == ["a/b/x.jsonl", "c/b/x.jsonl", "d/x.jsonl"]
    assert names_of(["/a/x.jsonl", "/a/x.jsonl"]) == ["x.jsonl", "x.jsonl"] and names_of([]) == []
