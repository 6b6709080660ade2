"""What an exam's figures say, and how they are written for people."""

from __future__ import annotations

from pathlib import Path

from qlora.study import exam_report
from qlora.study.exam_questions import ExamQuestion


def by_column(**right: int) -> tuple[list[ExamQuestion], dict[str, dict[str, str]]]:
    """100 questions, of which each column has so many right."""
    asked = [ExamQuestion(f"k{n}", "words", "Q?", (f"{n} kg",), "en", "p") for n in range(100)]
    answers = {name: {f"k{n}": f"{n} kg" if n < count else "no" for n in range(100)} for name, count in right.items()}
    return asked, answers


def test_what_falls_short_is_said_with_what_to_do(tmp_path: Path) -> None:
    good = {"base": 5, "base_retrieval": 60, "base_passage": 90, "tuned": 75, "tuned_retrieval": 85}
    assert exam_report.figures(*by_column(**good), [], 0)["advice"] == []
    (said,) = exam_report.figures(*by_column(**{**good, "tuned": 50}), [], 0)["advice"]
    assert "Retrieval answers more (60.0 %)" in said and "85.0 %" in said and "study.questions" in said
    (said,) = exam_report.figures(*by_column(**{**good, "tuned_retrieval": 55}), [], 0)["advice"]
    assert "study.with_passage" in said
    (said,) = exam_report.figures(*by_column(**{**good, "base_passage": 59}), [], 0)["advice"]
    assert "larger base" in said


def test_the_page_and_the_card_take_strangers_text_as_text(tmp_path: Path) -> None:
    asked, answers = by_column(base=0, tuned=0)
    evil = ExamQuestion("k0", "words", "# <script>\x1b[31m | `x`\n\n- y", ("`0 kg`",), "en")
    figures = exam_report.figures([evil, *asked[1:]], answers, [], 0)
    page = exam_report.markdown(figures, [evil, *asked[1:]], answers)
    lines = [line for line in page.splitlines() if "script" in line]
    assert lines and all(line.startswith("    asked: ") for line in lines) and "\x1b" not in page
    assert "| base | 100 | 0.0 % (0–4) |" in page
    assert exam_report.card_section(figures).startswith("## What it knows of its documents\n")


def test_coverage_and_dropped_rows_are_told_where_they_can_be_read(tmp_path: Path) -> None:
    figures = exam_report.figures(*by_column(tuned=1), [], 0)
    assert exam_report.with_study(figures, tmp_path)["dropped"] == {}
    (tmp_path / "coverage.json").write_text('{"sentences": 10, "with_question": 9, "passages": []}', "utf-8")
    (tmp_path / "dropped.jsonl").write_text('{"reason": "unsure"}\n' * 3 + '{"reason": "twice"}\n', "utf-8")
    told = exam_report.with_study(figures, tmp_path)
    assert told["coverage"] == {"sentences": 10, "with_question": 9} and told["dropped"] == {"unsure": 3, "twice": 1}
    (tmp_path / "dropped.jsonl").write_text('{"reason": 7}\n', "utf-8")
    assert exam_report.with_study(figures, tmp_path)["dropped"] == {}
