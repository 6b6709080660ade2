"""Questions of an exam: the study's as they are read again, the user's, and those that nothing answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.errors import DataError, RunFolderError
from qlora.study import exam_questions
from tests.study.passages import PASSAGES, OwnFile, candidate, made


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
        exam_questions.read_yours([OwnFile(str(tmp_path / name))], "en")
    assert told.value.hint


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That"}]},
    {"prompt": "What?", "completion": "That"},
    {"instruction": "What?", "input": "", "output": "That"},
    {"question": "What?", "answer": "That"},
])  # fmt: skip
def test_rows_of_training_formats_are_questions_too(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    (found,) = exam_questions.read_yours([OwnFile(str(tmp_path / "q.jsonl"))], "en")
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


def test_answers_as_squad_has_them(tmp_path: Path) -> None:
    answers = {"text": ["seven years", "7 years", "seven years"], "answer_start": [3, 40, 3]}
    row = {"id": "5", "title": "Pumps", "context": "…", "question": "How long?", "answers": answers}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    (found,) = exam_questions.read_yours([OwnFile(str(tmp_path / "q.jsonl"))], "en")
    assert found.answers == ("seven years", "7 years")
    (tmp_path / "q.jsonl").write_text(json.dumps({**row, "answers": {"text": [], "answer_start": []}}) + "\n", "utf-8")
    with pytest.raises(DataError, match=r"q\.jsonl:1.*empty"):
        exam_questions.read_yours([OwnFile(str(tmp_path / "q.jsonl"))], "en")
