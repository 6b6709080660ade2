"""The time line: processes as bars, and what happened in them as marks."""

from __future__ import annotations

import re

from qlora.report import timeline
from qlora.report.page import page
from qlora.report.run_log import Mark, Process
from tests.report.pages import judged


def test_processes_and_marks_stand_where_they_were() -> None:
    marks = [Mark(0, "notices", "in /home/alice/x/y"), Mark(50, "recovered", "less"), Mark(50.01, "recovered", "less")]
    made = page("t", timeline.draw([Process(0, 0, 0), Process(50, 7, 3600)], marks, 100))
    words = judged(made).text
    assert "went on after step 7: 50 s of work; nothing ran for 1 h 00 min before" in words and "…/y" in words
    assert "50 s: less (and 1 more)" in words and "alice" not in words
    (mark,) = re.findall(r'class="mark recovered" x1="(\d+)"', made)
    assert int(mark) == round((timeline.LEFT + timeline.WIDTH - timeline.RIGHT) / 2)


def test_marks_without_a_beginning_and_beyond_all_time_are_drawn() -> None:
    for until in (0.0, 1e-9, 3e11):
        judged(page("t", timeline.draw([], [Mark(until, "ended", "x")] * 3, until)))


def test_many_marks_are_one_a_unit() -> None:
    marks = [Mark(at, "saved", "x") for at in range(5_000)]
    assert len(page("t", timeline.draw([Process(0, 0, 0)], marks, 5_000))) < 60_000
