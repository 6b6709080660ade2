"""Passages of an invented manual, and candidates about them, as filters, split and exam meet them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from qlora.data.documents.chunks import Passage
from qlora.study import exam, exam_questions
from qlora.study.filters import Judged
from qlora.study.records import Answer, Candidate, Purpose, Question, key_of
from qlora.study.split import split


def passage(text: str, *headings: str, language: str = "en", document: str = "manual.md") -> Passage:
    """A passage whose sentences are the lines of `text`."""
    lines = tuple(text.strip().splitlines())
    shown = "\n\n".join([" › ".join(headings), " ".join(lines)]) if headings else " ".join(lines)
    return Passage(document, headings, lines, shown, "", language)


PUMP = passage(
    "The Tarvell TX200 heat pump has a warranty of seven years from the day of purchase.\n"
    "Its outdoor unit weighs 84 kg and needs a fuse of 16 A.\n"
    "The refrigerant is propane, and the filling is 1.2 kg.\n"
    "Maintenance by a certified technician is due every 24 months.",
    "Tarvell TX200",
    "Data",
)
CODES = passage(
    "Error code E41 means that the water pressure is below 0.8 bar.\n"
    "Error code E52 means that the outdoor fan is blocked by ice.\n"
    "To clear an error, hold the button marked OK for five seconds.",
    "Tarvell TX200",
    "Error codes",
)
PRICES = passage(
    "A filter set costs €49.90 and a fan motor costs €310.\n"
    "Orders above €500 are delivered free of charge within three working days.\n"
    "Returned parts are refunded within 14 days if the box is unopened.",
    "Prices and delivery",
)
BOILER = passage(
    "The Norvik B9 boiler has a warranty of two years from the day of purchase.\n"
    "Its tank holds 120 litres and heats up in 45 minutes.\n"
    "Descaling with citric acid is due every 12 months.",
    "Norvik B9",
    "Data",
)
PASSAGES = [PUMP, CODES, PRICES, BOILER]


def candidate(
    where: Passage,
    sentence: int,
    asked: str,
    answer: str,
    purpose: Purpose = "train",
    kind: str = "fact",
    **changed: object,
) -> Candidate:
    """A candidate that every filter keeps, but for what is `changed` of its answer."""
    key = key_of(where.key, sentence, purpose, asked)
    question = Question(key, where.key, sentence, kind, purpose, 1, asked)
    given = Answer(
        key, answer, (1, 2), ended=True, mean_probability=0.9, min_probability=0.7, closed_text="I do not know",
        closed_mean_probability=0.1, second_text=answer,
    )  # fmt: skip
    return Candidate(question, replace(given, **changed), where)  # type: ignore[arg-type]


ROWS = [
    candidate(PUMP, 0, "How long is the warranty of the Tarvell TX200?", "seven years"),
    candidate(PUMP, 0, "How many years of warranty does Tarvell give on the TX200?", "7"),
    candidate(PUMP, 1, "What is the weight of the TX200's outdoor unit?", "84 kg"),
    candidate(PUMP, 2, "Which refrigerant is in the Tarvell TX200?", "Propane"),
    candidate(CODES, 0, "What does error code E41 mean on a TX200?", "The water pressure is below 0.8 bar."),
    candidate(CODES, 1, "What does error code E52 mean on a TX200?", "The outdoor fan is blocked by ice."),
]
EXAM = [
    candidate(PUMP, 0, "How long is the warranty for the Tarvell TX200?", "seven years", purpose="exam"),
    candidate(PUMP, 1, "A courier must lift the TX200's unit for outdoors. How heavy is it?", "84 kg", purpose="exam"),
    candidate(PUMP, 2, "The TX200 is filled with which gas?", "propane", purpose="exam"),
    candidate(PUMP, 3, "A TX200 wants care how often?", "every 24 months", purpose="exam"),
    candidate(CODES, 0, "Water is short in a TX200: which code is shown?", "E41", purpose="exam"),
    candidate(CODES, 1, "Ice blocks the TX200: what is it that stands still?", "the outdoor fan", purpose="exam"),
]


@dataclass
class OwnFile:
    """A table of a recipe that names questions of the user's."""

    path: str
    columns: dict[str, str] = field(default_factory=dict)


def made(folder: Path) -> exam.Exam:
    """The exam of a study that left its questions and passages in `folder`."""
    hidden = candidate(PASSAGES[3], 2, "What is put into a Norvik B9 against scale?", "citric acid", purpose="left_out")
    exam_questions.save(folder, split(Judged([*ROWS, *EXAM, hidden], [], frozenset()), 10, seed=0))
    exam_questions.save_passages(folder, PASSAGES)
    return exam.Exam(folder, PASSAGES, exam_questions.asked_before(folder, PASSAGES), seed=0)
