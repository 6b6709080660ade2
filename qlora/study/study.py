"""A study, in reading order: probe, ask and answer passage by passage, filter, ask again where nothing stood, split.

All of it is kept in the run's folder `study/` as it is made, each record under a hash of what it follows from: a study
that was killed goes on where it was, and where one document changed only its changed passages are asked again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import disk
from qlora.events import Notice, Progress, Sink
from qlora.stop import StopRequest
from qlora.study import exam_questions, filters, prompts
from qlora.study.answer import Answered, Second, answer, answered_key
from qlora.study.ask import EXAM_PER_SENTENCE, EXAM_SPARE, Asked, Task, ask, asked_key, second_tasks, tasks_of
from qlora.study.filters import Dropped, Judged
from qlora.study.labels import LabelStore
from qlora.study.probe import Probed, probe, refuse_too_small, tell
from qlora.study.prompts import Frame
from qlora.study.records import Candidate, key_of
from qlora.study.split import Split, left_out, split
from qlora.study.store import Store
from qlora.study.teacher import Teacher

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

QUESTIONS_FILE = "questions.jsonl"
ANSWERS_FILE = "answers.jsonl"
LABELS_FILE = "labels.bin"
PROBE_FILE = "probe.json"
DROPPED_FILE = "dropped.jsonl"
COVERAGE_FILE = "coverage.json"
ENDED_FILE = "ended.jsonl"


@dataclass(frozen=True)
class StudySettings:
    """What `[study]` and `[exam]` ask for. `base` names weights and quantization: of another nothing is taken over."""

    questions: int
    kinds: tuple[str, ...]
    sure: float
    probe: bool
    max_minutes: float | None
    exam_questions: int
    left_out: float
    seed: int
    base: str

    @property
    def identity(self) -> tuple[Any, ...]:
        """What each record follows from, beside its passage."""
        return (prompts.version(), self.base, self.seed)


@dataclass(frozen=True)
class Ended:
    """That a study with a limit of time has gone on with what it had: a later process asks nothing more."""

    key: str


@dataclass(frozen=True)
class Studied:
    """What a study gives: rows and questions, the frame that the base reads in, and the labels of every answer."""

    split: Split
    frame: Frame
    labels: LabelStore


def study(
    teacher: Teacher,
    passages: Sequence[Passage],
    settings: StudySettings,
    folder: Path,
    sink: Sink,
    stop: StopRequest,
) -> Studied:
    """All phases. `folder` is there; what an earlier try left in it is taken over where it follows from the same.

    Raises ModelError for a base that is too small, RunFolderError for a folder that cannot be read, DoesNotFit, and
    StopAsked where a stop was asked for: all that was written is kept.
    """
    stop.check()
    _tell_languages(passages, sink)
    probed = probe(teacher, passages, folder / PROBE_FILE, settings.kinds, settings.identity)
    tell(teacher, probed)
    if settings.probe:
        refuse_too_small(probed, "model.base")
    work = _Work(teacher, passages, settings, folder, probed)
    first = {passage.key: work.first_tasks(passage) for passage in passages}
    work.do(first, 1)
    judged = filters.judge(work.candidates, passages, settings.sure)
    if again := work.second_tasks(first, judged):
        work.do(again, 2)
        judged = filters.judge(work.candidates, passages, settings.sure)
    found = split(judged, settings.exam_questions, settings.seed)
    dropped = [*_unanswered(work.asked, passages), *judged.dropped]
    _write(folder, passages, work.asked, dropped, found)
    work.end()
    _tell(sink, passages, work.asked, dropped, found)
    return Studied(found, probed.frame, work.labels)


class _Work:
    """Asking and answering, passage by passage, and all that has been asked so far."""

    def __init__(
        self, teacher: Teacher, passages: Sequence[Passage], settings: StudySettings, folder: Path, probed: Probed
    ) -> None:
        self.teacher, self.passages, self.settings = teacher, passages, settings
        self.frame: Frame = probed.frame
        self.second: Second = probed.second
        self.questions = Store(folder / QUESTIONS_FILE, Asked)
        self.answers = Store(folder / ANSWERS_FILE, Answered)
        self.labels = LabelStore(folder / LABELS_FILE, teacher.model.get_input_embeddings().weight.shape[0])
        self.labels.cut_torn()
        has_exam = settings.exam_questions > 0
        self.left_out = left_out(passages, settings.left_out, settings.seed) if has_exam else frozenset()
        self.exam = _ExamShare.of(passages, settings, len(self.left_out))
        self.asked: list[Asked] = []
        self.candidates: list[Candidate] = []
        self.started = time.monotonic()
        self.ended = Store(folder / ENDED_FILE, Ended)
        keys = sorted(passage.key for passage in passages)
        self.ending = key_of("ended", *settings.identity, *map(str, asdict(settings).values()), *keys)

    def end(self) -> None:
        """Rows and exam are made of what there is: training follows from them, and a resumed run finds the same."""
        if self.settings.max_minutes is not None and self.ended.get(self.ending) is None:
            self.ended.append(Ended(self.ending))

    def first_tasks(self, passage: Passage) -> tuple[Task, ...]:
        places = range(len(passage.sentences))
        hidden = {place for place in places if (passage.key, place) in self.left_out}
        exam = [EXAM_PER_SENTENCE if place in hidden else self.exam.count(passage.sentences[place]) for place in places]
        return tasks_of(passage, hidden, self.settings.questions, self.settings.kinds, exam)

    def second_tasks(self, first: Mapping[str, Sequence[Task]], judged: Judged) -> dict[str, tuple[Task, ...]]:
        """For sentences that were asked about without one good question for it."""
        good = {(c.question.passage, c.question.sentence) for c in judged.kept if c.question.purpose == "train"}
        done = {asked.passage for asked in self.asked}
        found = {}
        for key in sorted(done):
            tried = {task.sentence for task in first[key] if task.purpose == "train"}
            without = {place for place in tried if (key, place) not in good}
            found[key] = second_tasks(first[key], without, self.settings.kinds)
        return {key: tasks for key, tasks in found.items() if tasks}

    def do(self, tasks: Mapping[str, Sequence[Task]], number: int) -> None:
        """Asks and answers `tasks` of each passage, those of earlier tries taken over."""
        wanted = [passage for passage in self.passages if tasks.get(passage.key)]
        done: dict[str, tuple[Asked, Answered]] = {}
        for passage in wanted:
            if (before := self._before(passage, tasks[passage.key], number)) is not None:
                done[passage.key] = before
        self._tell_kept(len(done), len(wanted), number)
        left = self._in_order([passage for passage in wanted if passage.key not in done])
        began = time.monotonic()
        for fresh, passage in enumerate(left, 1):
            if self._is_over:
                break
            self.teacher.sink.emit(Progress("study", len(done), len(wanted), "passages"))
            done[passage.key] = self._passage(passage, tasks[passage.key], number)
            if fresh == 1 and number == 1 and len(left) > 1:
                self._tell_end(time.monotonic() - began, len(left) - 1)
        self.teacher.sink.emit(Progress("study", len(done), len(wanted), "passages"))
        if len(done) < len(wanted):
            message = (
                f"study.max_minutes = {self.settings.max_minutes:g} is over: {len(done):,} of {len(wanted):,} passages "
                f"were {'asked' if number == 1 else 'asked again'}, from all over the documents; it goes on with these"
            )
            self.teacher.sink.emit(Notice("study", message, len(wanted) - len(done)))
        for passage in wanted:
            if passage.key in done:
                self._take(passage, *done[passage.key])

    def _take(self, passage: Passage, asked: Asked, answered: Answered) -> None:
        self.asked.append(asked)
        given = {one.question: one for one in answered.answers}
        asked_of = [question for question in asked.questions if question.key in given]
        self.candidates += [Candidate(question, given[question.key], passage) for question in asked_of]

    def _before(self, passage: Passage, tasks: Sequence[Task], number: int) -> tuple[Asked, Answered] | None:
        """What an earlier try asked and answered, whole with its labels; None where anything is missing."""
        asked = self.questions.get(self._asked_key(passage, tasks, number))
        answered = None if asked is None else self.answers.get(self._answered_key(asked))
        if asked is None or answered is None or not all(one.question in self.labels for one in answered.answers):
            return None
        return asked, answered

    def _passage(self, passage: Passage, tasks: Sequence[Task], number: int) -> tuple[Asked, Answered]:
        """Labels are on the disk before the answers that they belong to: an answer that is there has them."""
        key = self._asked_key(passage, tasks, number)
        asked = self.questions.get(key)
        if asked is None:
            asked = ask(self.teacher, self.frame, passage, tasks, key, number)
            self.questions.append(asked)
        self.teacher.stop.check()
        worth = [question for question in asked.questions if filters.form_of(question, passage) is None]
        answers, labels = answer(self.teacher, self.frame, self.second, passage, worth)
        self.labels.append([(name, one) for name, one in labels if not self.labels.holds(name, one)])
        answered = Answered(self._answered_key(asked), passage.key, tuple(answers))
        self.answers.append(answered)
        return asked, answered

    def _asked_key(self, passage: Passage, tasks: Sequence[Task], number: int) -> str:
        return asked_key(passage, tasks, self.frame, number, self.settings.identity)

    def _answered_key(self, asked: Asked) -> str:
        return answered_key(asked.key, asked.questions, self.frame, self.second, self.settings.identity)

    @property
    def _is_over(self) -> bool:
        limit = self.settings.max_minutes
        if self.ended.get(self.ending) is not None:
            return True
        return limit is not None and time.monotonic() - self.started >= 60 * limit

    def _in_order(self, passages: Sequence[Passage]) -> list[Passage]:
        """As they stand; under a limit of time in an order that is drawn, so that no document comes too late."""
        if self.settings.max_minutes is None:
            return list(passages)
        return sorted(passages, key=lambda passage: key_of("order", self.settings.seed, passage.key))

    def _tell_kept(self, kept: int, wanted: int, number: int) -> None:
        if kept:
            what = "asked and answered" if number == 1 else "asked a second time"
            message = f"{kept:,} of {wanted:,} passages were {what} before: {wanted - kept:,} are left to ask"
            self.teacher.sink.emit(Notice("study", message, kept))

    def _tell_end(self, seconds: float, left: int) -> None:
        total = seconds * left
        limit = self.settings.max_minutes
        if limit is not None:
            total = min(total, max(0.0, 60 * limit - (time.monotonic() - self.started)))
        end = datetime.now().astimezone() + timedelta(seconds=total)
        message = f"the first passage took {seconds:.0f} s: {left:,} more until about {end:%H:%M on %d %B}"
        self.teacher.sink.emit(Notice("study", message, left))


@dataclass(frozen=True)
class _ExamShare:
    """How many exam questions a sentence is asked: `each` of one sentence in `one_in`, drawn by its words.

    `one_in` is a power of two, so that an edit elsewhere seldom changes which sentences these are.
    """

    each: int
    one_in: int
    seed: int

    @classmethod
    def of(cls, passages: Sequence[Passage], settings: StudySettings, hidden: int) -> _ExamShare:
        sentences = max(1, sum(len(passage.sentences) for passage in passages) - hidden)
        wanted = EXAM_SPARE * settings.exam_questions
        one_in = 1
        while wanted and sentences // (2 * one_in) >= wanted:
            one_in *= 2
        return cls(min(EXAM_PER_SENTENCE, ceil(wanted * one_in / sentences)), one_in, settings.seed)

    def count(self, sentence: str) -> int:
        drawn = int(key_of("exam", self.seed, sentence)[:8], 16)
        return self.each if drawn % self.one_in == 0 else 0


def _tell_languages(passages: Sequence[Passage], sink: Sink) -> None:
    foreign = Counter(passage.language for passage in passages if prompts.prompts_for(passage.language).foreign)
    if foreign:
        known = ", ".join(prompts.languages())
        message = (
            f"{foreign.total():,} passages are in another language than there are prompts for ({known}): they are "
            "studied with English prompts that ask for the documents' language"
        )
        sink.emit(Notice("study", message, foreign.total()))


def _unasked(asked: Sequence[Asked]) -> Iterator[dict[str, Any]]:
    """What was written in place of a question, as lines of dropped.jsonl."""
    for one in asked:
        for lost in one.unasked:
            yield {"passage": one.passage, **asdict(lost), "reason": "no question"}


def _unanswered(asked: Sequence[Asked], passages: Sequence[Passage]) -> list[Dropped]:
    """Questions that were not worth an answer."""
    by_key = {passage.key: passage for passage in passages}
    formed = [filters.form_of(question, by_key[one.passage]) for one in asked for question in one.questions]
    return [lost for lost in formed if lost is not None]


def _write(
    folder: Path, passages: Sequence[Passage], asked: Sequence[Asked], dropped: Sequence[Dropped], found: Split
) -> None:
    """What was dropped with its reason, how many questions each sentence has, and the exam."""
    judged = [one.record() for one in dropped] + [leak.record() for leak in found.leaks]
    lost = [*_unasked(asked), *judged]
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lost)
    disk.write_atomic(folder / DROPPED_FILE, lines)
    covered = filters.coverage(passages, [*found.train, *found.hold])
    disk.write_atomic(folder / COVERAGE_FILE, json.dumps(covered, ensure_ascii=False, indent=1) + "\n")
    exam_questions.save(folder, found)


def _tell(
    sink: Sink, passages: Sequence[Passage], asked: Sequence[Asked], dropped: Sequence[Dropped], found: Split
) -> None:
    tried = sum(len(one.questions) + len(one.unasked) for one in asked)
    learnt = len(found.train) + len(found.hold)
    message = f"{learnt:,} of {tried:,} questions asked are good to learn, {len(found.hold):,} of them known already"
    sink.emit(Notice("study", message, learnt))
    if lost := sum(len(one.unasked) for one in asked):
        sink.emit(Notice("study", "questions left out: what was written is no question", lost))
    for notice in filters.notices(dropped):
        sink.emit(notice)
    if found.leaks:
        sink.emit(Notice("study", "questions left out: they would give an exam question away", len(found.leaks)))
    covered = filters.coverage(passages, [*found.train, *found.hold])
    share = covered["with_question"] / max(1, covered["sentences"])
    said = f"coverage: {share:.0%} of {covered['sentences']:,} sentences have a question"
    sink.emit(Notice("study", said, covered["with_question"]))
    held = f"{len(found.exam):,} questions are kept for the exam, and {len(found.left_out):,} on sentences left out"
    sink.emit(Notice("study", held, len(found.exam) + len(found.left_out)))
