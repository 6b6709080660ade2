"""The probe: can this base read what stands before it, and in which frame? 20 questions on 5 passages, before all else.

There is no right answer at hand, so one counts as right when it is whole, its numbers, names and words stand in the
passage, and the same comes out of the sentence alone: two readings that agree on something that is written there. A
base of 135 M parameters passes with none of 20, one of 270 M with four; what reads passes with most.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from qlora import disk, files, foreign_json
from qlora.errors import ModelError
from qlora.events import Notice, Progress
from qlora.study.answer import Second, answer
from qlora.study.ask import Asked, Task, ask
from qlora.study.filters import agrees, answered, form_of, grounded
from qlora.study.prompts import FRAMES, Frame
from qlora.study.records import Answer, Candidate, Key, Question, key_of
from qlora.study.teacher import Teacher

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

PASSAGES = 5
QUESTIONS = 20
ENOUGH = 0.6  # share of right answers, of the questions that could be asked
PARSED = 0.25  # share of the questions that must be questions at all
MAX_BYTES = 1_000_000
_SHOWN = 3  # examples in notices; the file has all
_TOO_SMALL = "use a larger base, an instruct one of 3B parameters or more, or set study.probe = false to go on with it"
Count = Annotated[int, Field(ge=0, le=QUESTIONS)]


@dataclass(frozen=True)
class Trial:
    """One question of the probe, and what became of it."""

    sentence: str
    question: str
    answer: str
    second: str
    reason: str  # "" where it is right


@dataclass(frozen=True)
class Reading:
    """How the base did in one frame: questions tried for, those that were questions, those answered right."""

    frame: Frame
    asked: Count
    parsed: Count
    right: Count
    trials: tuple[Trial, ...]

    @property
    def share(self) -> float:
        return self.right / self.parsed if self.parsed else 0.0

    @property
    def reads(self) -> bool:
        return self.parsed >= PARSED * self.asked and self.share >= ENOUGH


@dataclass(frozen=True)
class Probed:
    """What probe.json holds. `frame` is the better one, in which everything is asked and answered."""

    key: Key
    frame: Frame
    second: Second
    readings: tuple[Reading, ...]

    @property
    def best(self) -> Reading:
        return next(reading for reading in self.readings if reading.frame == self.frame)


def probe(
    teacher: Teacher, passages: Sequence[Passage], file: Path, kinds: Sequence[str], identity: Sequence[Any]
) -> Probed:
    """The probe of these passages, from `file` where it was made for the same; else made now and written there.

    Raises RowError where a template cannot render a prompt.
    """
    chosen = passages[:: max(1, len(passages) // PASSAGES)][:PASSAGES]
    key = key_of("probe", [passage.key for passage in chosen], list(kinds), *identity)
    if (before := _read(file)) is not None and before.key == key:
        return before
    frames = [frame for frame in FRAMES if frame == "lines" or teacher.chat.template is not None]
    readings = []
    for number, frame in enumerate(frames):
        teacher.sink.emit(Progress("probe", number, len(frames)))
        readings.append(_reading(teacher, chosen, frame, kinds, key))
    teacher.sink.emit(Progress("probe", len(frames), len(frames)))
    best = max(readings, key=lambda reading: (reading.reads, reading.right, reading.frame == "chat"))
    second: Second = "other frame" if len(readings) > 1 and all(reading.reads for reading in readings) else "sentence"
    found = Probed(key, best.frame, second, tuple(readings))
    disk.write_atomic(file, json.dumps(asdict(found), ensure_ascii=False, indent=1) + "\n")
    return found


def tell(teacher: Teacher, probed: Probed) -> None:
    """Notices of how the base read, with examples of what it did wrong."""
    for reading in probed.readings:
        message = (
            f"probe ({_NAMES[reading.frame]}): {reading.right} of {reading.parsed} answers right with the passage in "
            f"view; {reading.parsed} of {reading.asked} tries gave a question"
        )
        teacher.sink.emit(Notice("probe", message, reading.right))
    for trial in [trial for trial in probed.best.trials if trial.reason][:_SHOWN]:
        said = f"asked {trial.question!r}, answered {trial.answer!r}" if trial.question else "no question"
        teacher.sink.emit(Notice("probe", f"about {trial.sentence[:80]!r}: {said}: {trial.reason}"))


def refuse_too_small(probed: Probed, base: str) -> None:
    """Raises ModelError for a base that asks no questions, or answers too few of them rightly from the passage."""
    best = probed.best
    if best.parsed < PARSED * best.asked:
        wrote = next((trial.answer for trial in best.trials if not trial.question), "")
        what = f"{base}: {best.parsed} of {best.asked} tries gave a question; it wrote such as {wrote[:100]!r}"
        raise ModelError(what, f"it cannot ask itself about documents: {_TOO_SMALL}")
    if not best.reads:
        what = (
            f"{base}: {best.right} of {best.parsed} answers ({best.share:.0%}) were right with the passage in view, "
            f"and {ENOUGH:.0%} are needed: this base is too small to teach itself"
        )
        raise ModelError(what, f"{_TOO_SMALL} (probe.json has what it wrote)")


_NAMES: dict[Frame, str] = {"chat": "chat template", "lines": "plain lines"}


def _reading(teacher: Teacher, passages: Sequence[Passage], frame: Frame, kinds: Sequence[str], key: str) -> Reading:
    trials: list[Trial] = []
    for number, passage in enumerate(passages):
        count = len(range(number, QUESTIONS, len(passages)))
        places = range(len(passage.sentences))
        tasks = [
            Task(places[at % len(places)], kinds[at % len(kinds)], "train") for at in range(count if places else 0)
        ]
        asked = ask(teacher, frame, passage, tasks, key_of(key, frame, passage.key), 1)
        answers, _ = answer(teacher, frame, "sentence", passage, asked.questions)
        trials += _trials(passage, asked, answers)
    parsed = sum(bool(trial.question) for trial in trials)
    return Reading(frame, len(trials), parsed, sum(not trial.reason for trial in trials), tuple(trials))


def _trials(passage: Passage, asked: Asked, answers: Sequence[Answer]) -> list[Trial]:
    trials = [
        Trial(passage.sentences[lost.sentence], "", lost.text, "", "no question was written") for lost in asked.unasked
    ]
    for question, given in zip(asked.questions, answers, strict=True):
        sentence = passage.sentences[question.sentence]
        # What is no question in form counts as none: the words of a base that only goes on.
        lost = form_of(question, passage)
        if lost is not None and lost.reason == "form":
            trials.append(Trial(sentence, "", question.text, "", "no question was written"))
            continue
        reason = _wrong(question, given, passage) if lost is None else f"{lost.reason} {lost.detail}".strip()
        trials.append(Trial(sentence, question.text, given.text, given.second_text, reason))
    return trials


def _wrong(question: Question, given: Answer, passage: Passage) -> str:
    """Why an answer is not believed; "" where it is."""
    candidate = Candidate(question, given, passage)
    lost = answered(candidate) or grounded(candidate) or agrees(candidate)
    return "" if lost is None else f"{lost.reason} {lost.detail}".strip()


def frame_of(file: Path) -> Frame | None:
    """In which frame a base read better, as a run's probe.json has it; None where there is none."""
    found = _read(file)
    return None if found is None else found.frame


def _read(file: Path) -> Probed | None:
    """What an earlier probe found; None without one, or where it cannot be read: then it is made again."""
    try:
        return foreign_json.checked_line(Probed, files.read_bytes(file, MAX_BYTES), str(file))
    except (OSError, files.UnsafePathError, foreign_json.ForeignFileError):
        return None
