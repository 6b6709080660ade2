"""The exam: the same questions to the base, to the base with passages in view, and to the tuned model.

Five columns: base · base + the best 3 passages (BM25) · base + its own passage · tuned · tuned + the best 3 passages.
Answers are greedy. Each is appended and synced under a key of all that it follows from, so that an exam that was
killed goes on where it was, and questions that were asked before are not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qlora.events import Examined, Progress, Sink
from qlora.study import bm25, exam_report
from qlora.study.exam_questions import ExamQuestion, Part, neutral_prompts, save_yours
from qlora.study.prompts import Frame, prompts_for
from qlora.study.records import key_of
from qlora.study.store import Store

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

ANSWERS_FILE = "exam_answers.jsonl"
NATS_FILE = "exam_nats.jsonl"
MAX_TOKENS = 64  # of an answer: the study's own are short, and a chatty one says its fact within two sentences
RETRIEVED = 3
View = Literal["nothing", "retrieved", "own"]
# By column: whether the tuned model answers, and what it sees.
COLUMNS: Mapping[str, tuple[bool, View]] = {
    "base": (False, "nothing"),
    "base_retrieval": (False, "retrieved"),
    "base_passage": (False, "own"),
    "tuned": (True, "nothing"),
    "tuned_retrieval": (True, "retrieved"),
}
_OF_PART: Mapping[Part, tuple[str, ...]] = {
    "words": tuple(COLUMNS),
    "yours": tuple(COLUMNS),
    "left_out": ("base", "tuned"),
    "unanswerable": ("base", "tuned"),
}


class Asker(Protocol):
    """Who answers. `base_id` and `tuned_id` say what the answers follow from: they change when the weights do.
    `at_once`: how many answers are asked for between two writes to the disk.

    `frame` is the one in which rows are learnt and served; the base alone is asked in `base_frame`, in which it reads
    better: what it can do is measured, not what a template that it was never taught makes of it."""

    frame: Frame
    base_frame: Frame
    base_id: str
    tuned_id: str
    at_once: int

    def base(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The base's greedy answer to each prompt (of `prompts.Prompts`, in `base_frame`)."""

    def tuned(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The tuned model's, in `frame`."""

    def nats(self, texts: Sequence[str]) -> list[float]:
        """KL(base || tuned) in nats a token at each prompt, along the base's own greedy answer; none where that
        cannot be measured."""


@dataclass(frozen=True)
class Exam:
    """What is asked, and where the answers are kept: `folder` is the run's `study/`."""

    folder: Path
    passages: Sequence[Passage]
    questions: Sequence[ExamQuestion]
    seed: int

    @cached_property
    def search(self) -> bm25.Search:
        return bm25.Search(self.passages)

    @cached_property
    def by_key(self) -> dict[str, Passage]:
        return {passage.key: passage for passage in self.passages}

    def of(self, column: str) -> list[ExamQuestion]:
        """The questions of a column. A passage that is not there any more cannot be shown."""
        sees_own = COLUMNS[column][1] == "own"
        return [
            question
            for question in self.questions
            if column in _OF_PART[question.part] and (not sees_own or question.passage in self.by_key)
        ]

    def prompt(self, question: ExamQuestion, column: str, frame: Frame) -> str:
        """What is asked in a column, as text."""
        prompts, view = prompts_for(question.language), COLUMNS[column][1]
        if view == "own" and question.passage is not None:
            return prompts.answer(frame, self.by_key[question.passage], question.text)
        found = self.search.best(question.text, question.language, RETRIEVED) if view == "retrieved" else []
        # Nothing found: there is nothing to show.
        return prompts.answer_from(frame, found, question.text) if found else prompts.closed(frame, question.text)


@dataclass(frozen=True)
class ExamAnswer:
    """A line of exam_answers.jsonl. `key` is of who was asked what."""

    key: str
    column: str
    question: str
    text: str


@dataclass(frozen=True)
class NeutralNats:
    """A line of exam_nats.jsonl."""

    key: str
    prompt: str
    nats: float


def before(exam: Exam, asker: Asker, sink: Sink) -> None:
    """Ask the base, before anything is learnt: what `after` needs of it is then on the disk."""
    save_yours(exam.folder, exam.questions)
    for column, (is_tuned, _) in COLUMNS.items():
        if not is_tuned:
            ask(exam, column, asker, sink)


def after(exam: Exam, asker: Asker, sink: Sink) -> dict[str, Any]:
    """Ask the tuned model, score all columns, write exam.json and exam.md. Returns the figures: see `exam_report`."""
    figures, answers = measure(exam, asker, sink)
    exam_report.write(exam.folder, figures, exam.questions, answers)
    sink.emit(Examined(figures))
    return figures


def measure(exam: Exam, asker: Asker, sink: Sink) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Ask what was not asked yet. Returns the figures, and the answers by column and question; writes no figures."""
    answers = {column: ask(exam, column, asker, sink) for column in COLUMNS}
    figures = exam_report.figures(exam.questions, answers, _nats(exam, asker, sink), exam.seed)
    return exam_report.with_study(figures, exam.folder), answers


def ask(exam: Exam, column: str, asker: Asker, sink: Sink) -> dict[str, str]:
    """A column's answers by the questions' keys; those that were given before are not given again."""
    is_tuned = COLUMNS[column][0]
    who = asker.tuned_id if is_tuned else asker.base_id
    answering: Callable[[Sequence[str], int], list[str]] = asker.tuned if is_tuned else asker.base
    frame = asker.frame if is_tuned else asker.base_frame
    store, questions = Store(exam.folder / ANSWERS_FILE, ExamAnswer), exam.of(column)
    texts = {question.key: exam.prompt(question, column, frame) for question in questions}
    keys = {key: key_of("exam", who, frame, text, MAX_TOKENS) for key, text in texts.items()}
    left = [question.key for question in questions if store.get(keys[question.key]) is None]
    for start in range(0, len(left), asker.at_once):
        sink.emit(Progress("exam", start, len(left), "answers"))
        chosen = left[start : start + asker.at_once]
        for key, text in zip(chosen, answering([texts[key] for key in chosen], MAX_TOKENS), strict=True):
            store.append(ExamAnswer(keys[key], column, key, text))
    return {key: found.text for key, own in keys.items() if (found := store.get(own)) is not None}


def _nats(exam: Exam, asker: Asker, sink: Sink) -> list[float]:
    """KL to the base at the neutral prompts that could be measured."""
    store = Store(exam.folder / NATS_FILE, NeutralNats)
    texts = [prompts_for("en").closed(asker.frame, prompt) for prompt in neutral_prompts()]
    keys = [key_of("nats", asker.base_id, asker.tuned_id, asker.frame, text) for text in texts]
    left = [at for at, key in enumerate(keys) if store.get(key) is None]
    for start in range(0, len(left), asker.at_once):
        sink.emit(Progress("exam", start, len(left), "other prompts"))
        chosen = left[start : start + asker.at_once]
        measured = asker.nats([texts[at] for at in chosen])
        for at, value in zip(chosen, measured, strict=False):
            store.append(NeutralNats(keys[at], texts[at], value))
    return [found.nats for key in keys if (found := store.get(key)) is not None]
