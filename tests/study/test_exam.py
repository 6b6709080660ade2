"""The exam with askers that follow a script: columns, counts, resuming, figures and what is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qlora.errors import DataError, RunFolderError
from qlora.events import Recorder
from qlora.study import exam, exam_questions, exam_report
from qlora.study.exam_questions import ExamQuestion
from qlora.study.filters import Judged
from qlora.study.prompts import Frame
from qlora.study.split import split
from tests.study.passages import PASSAGES, candidate
from tests.study.test_split import EXAM, ROWS


@dataclass
class Script:
    """Answers with what stands in view, tuned also with what it has learnt."""

    learnt: dict[str, str] = field(default_factory=dict)
    frame: Frame = "chat"
    base_id: str = "base"
    tuned_id: str = "tuned"
    at_once: int = 4
    calls: list[tuple[str, str]] = field(default_factory=list)
    stop_after: int = 1_000_000

    def _answer(self, who: str, texts: Sequence[str]) -> list[str]:
        if len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += [(who, text) for text in texts]
        seen = {"How heavy": ("84 kg", "It weighs 84 kg."), "which gas": ("propane", "Propane."),
                "How long is the warranty": ("seven years", "For 7 years!")}  # fmt: skip
        answers = []
        for text in texts:
            known = next((said for asked, said in self.learnt.items() if who == "tuned" and asked in text), None)
            read = next(
                (said for asked, (fact, said) in seen.items() if asked in text and fact in text), "I don't know."
            )
            answers.append(known or read)
        return answers

    def base(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._answer("base", texts)

    def tuned(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._answer("tuned", texts)

    def nats(self, texts: Sequence[str]) -> list[float]:
        return [0.25] * len(texts)


def made(folder: Path) -> exam.Exam:
    hidden = candidate(PASSAGES[3], 2, "What is put into a Norvik B9 against scale?", "citric acid", purpose="left_out")
    exam_questions.save(folder, split(Judged([*ROWS, *EXAM, hidden], [], frozenset()), 10, seed=0))
    exam_questions.save_passages(folder, PASSAGES)
    return exam.Exam(folder, PASSAGES, exam_questions.asked_before(folder, PASSAGES), seed=0)


LEARNT = {"How long is the warranty": "seven years", "How heavy": "84 kg", "which gas": "It is propane",
          "Ostrelle founded": "In 1987."}  # fmt: skip


def test_five_columns_are_counted_as_a_plain_count_has_them(tmp_path: Path) -> None:
    told, asker, sink = made(tmp_path), Script(LEARNT), Recorder()
    exam.before(told, asker, sink)
    assert {who for who, _ in asker.calls} == {"base"}
    figures = exam.after(told, asker, sink)
    words = figures["parts"]["words"]
    # Four questions: three facts that a passage in view answers, and one that none does.
    shares = {name: round(4 * column["right"]["mean"]) for name, column in words["columns"].items()}
    assert shares["base"] == 0 and shares["base_passage"] == 3 and shares["tuned"] == 3
    assert words["questions"] == 4 and words["untaught"] == 1
    # Only one of the two is right in three, the other in none: 2 · (1/2)³.
    assert words["p_values"]["tuned/base"] == pytest.approx(0.25)
    assert list(figures["parts"]["left_out"]["columns"]) == ["base", "tuned"]
    assert figures["unanswerable"] == {"questions": 20, "base": 0.0, "tuned": 0.05}
    assert figures["elsewhere"] == {"prompts": 100, "nats": 0.25}
    assert json.loads((tmp_path / "exam.json").read_text("utf-8")) == figures
    assert sink.of("exam")[-1].figures == figures  # type: ignore[attr-defined]


def test_an_exam_that_was_killed_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    told, whole = made(tmp_path), Script(LEARNT)
    killed = Script(LEARNT, stop_after=9)
    with pytest.raises(KeyboardInterrupt):
        exam.after(told, killed, Recorder())
    with (tmp_path / exam.ANSWERS_FILE).open("ab") as file:
        file.write(b'{"key": "torn')  # by the kill
    goes_on = Script(LEARNT)
    after = exam.after(told, goes_on, Recorder())
    (tmp_path / exam.ANSWERS_FILE).unlink()
    assert exam.after(told, whole, Recorder()) == after
    assert sorted(killed.calls + goes_on.calls) == sorted(whole.calls)
    again = Script(LEARNT)
    exam.after(told, again, Recorder())
    assert again.calls == []
    another = Script(LEARNT, tuned_id="trained on")
    exam.after(told, another, Recorder())
    assert {who for who, _ in another.calls} == {"tuned"}


def test_the_user_s_questions_come_first_and_stay_with_the_run(tmp_path: Path) -> None:
    rows = tmp_path / "ours.jsonl"
    rows.write_text('{"question": "Weight of the unit?", "answers": ["84 kg", "84 kilograms"]}\n', "utf-8")
    told = made(tmp_path)
    asked = exam_questions.all_questions(tmp_path, [_Own(str(rows))], PASSAGES)
    exam.before(exam.Exam(tmp_path, PASSAGES, asked, 0), Script(), Recorder())
    rows.unlink()
    again = exam_questions.asked_before(tmp_path, PASSAGES)
    assert again == asked and again[0].part == "yours" and again[0].answers == ("84 kg", "84 kilograms")
    figures = exam.after(exam.Exam(tmp_path, PASSAGES, again, 0), Script(), Recorder())
    assert list(figures["parts"]) == ["yours", "words", "left_out"]
    assert "base_passage" not in figures["parts"]["yours"]["columns"] and told.questions == again[1:]


@dataclass
class _Own:
    path: str
    columns: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"frage": "Was?", "antwort": "Das"}\n'),
        ("b.jsonl", '{"question": "What?", "answer": ""}\n'),
        ("c.jsonl", '{"question": "What?", "answers": [{"text": "that"}]}\n'),
        ("d.csv", "id,name\n1,x\n"),
        ("e.jsonl", "{broken\n"),
        ("f.jsonl", '{"question": "' + "x" * 30_000 + '", "answer": "y"}\n'),
    ],
)
def test_a_file_without_questions_is_told_by_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match=name) as told:
        exam_questions.read_yours([_Own(str(tmp_path / name))], "en")
    assert told.value.hint


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That"}]},
    {"prompt": "What?", "completion": "That"},
    {"instruction": "What?", "input": "", "output": "That"},
    {"question": "What?", "answer": "That"},
])  # fmt: skip
def test_rows_of_training_formats_are_questions_too(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    (found,) = exam_questions.read_yours([_Own(str(tmp_path / "q.jsonl"))], "en")
    assert (found.text, found.answers) == ("What?", ("That",))


@pytest.mark.parametrize(
    "line",
    [
        b"{}\n",
        b"not json\n",
        b'{"key": 1, "part": "words", "text": "a?", "answers": ["b"], "language": "en"}\n',
        b'{"key": "k", "part": "yours", "text": "a?", "answers": ["b"], "language": "en"}\n',
        b'{"key": "k", "part": "words", "text": "a?", "answers": [], "language": "en"}\n',
        b'{"key": "k", "part": "words", "text": "' + b"x" * 2_000_000 + b'", "answers": ["b"], "language": "en"}\n',
    ],
)
def test_a_broken_exam_file_is_told_by_line(tmp_path: Path, line: bytes) -> None:
    made(tmp_path)
    good = (tmp_path / "exam.jsonl").read_bytes()
    (tmp_path / "exam.jsonl").write_bytes(good + line)
    with pytest.raises(RunFolderError, match=f"exam.jsonl:{len(good.splitlines()) + 1}"):
        exam_questions.load(tmp_path)


def test_a_link_is_not_read(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "exam.jsonl").rename(tmp_path / "elsewhere")
    (tmp_path / "exam.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="link"):
        exam_questions.load(tmp_path)


def test_nothing_asks_for_what_stands_in_a_document() -> None:
    asked = exam_questions.unanswerable([*PASSAGES], "en")
    one = exam_questions.unanswerable([candidate(PASSAGES[0], 0, "?", "Ostrelle").passage], "en")
    assert asked == one and len({question.text for question in asked}) == 20
    named = [exam_questions.Passage("d", (), ("Ostrelle is ours.",), "Ostrelle is ours.", "", "en")]
    assert not any("Ostrelle" in question.text for question in exam_questions.unanswerable(named, "en"))
    assert len({*exam_questions.neutral_prompts()}) == 100
    for language in ("de", "fr", "es", "zh"):
        assert len(exam_questions.unanswerable([], language)) == 20


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
