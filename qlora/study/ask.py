"""Asking: the base asks about each sentence of a passage, in kinds that are spread over the sentences.

What is asked of a passage follows from the passage and the settings alone, so that an edit elsewhere asks nothing anew.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from qlora.study.prompts import Frame, Wording, prompts_for, question_in
from qlora.study.records import Key, Purpose, Question, key_of
from qlora.study.teacher import Teacher

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

TEMPERATURE = 0.8
QUESTION_TOKENS = 64  # the filters let 40 words pass
# For each question of the exam two are asked: the filters drop some, and a fact must be learnt to be asked about.
EXAM_SPARE = 2
EXAM_PER_SENTENCE = 3  # at most: a short document has few sentences
_SHOWN = 200  # characters kept of what was no question


@dataclass(frozen=True)
class Task:
    """A question to be asked: of which sentence, of what kind, for what."""

    sentence: int
    kind: str
    purpose: Purpose

    @property
    def wording(self) -> Wording:
        return "ask" if self.purpose == "train" else "ask_exam"


@dataclass(frozen=True)
class Unasked:
    """What a base wrote in place of a question."""

    sentence: int
    kind: str
    text: str


@dataclass(frozen=True)
class Asked:
    """A line of questions.jsonl: what was asked of one passage in one round. `key`: a hash of what it follows from."""

    key: Key
    passage: str
    round: Annotated[int, Field(ge=1, le=2)]
    questions: tuple[Question, ...]
    unasked: tuple[Unasked, ...]


def tasks_of(
    passage: Passage, left_out: Collection[int], count: int, kinds: Sequence[str], exam: Sequence[int]
) -> tuple[Task, ...]:
    """The first round: `count` questions over the sentences that are studied, each met once before any is met twice.

    `exam`: questions for the exam about each sentence, in other words; about those of `left_out` nothing else is asked.
    """
    studied = [place for place in range(len(passage.sentences)) if place not in left_out]
    spread = [
        Task(studied[at % len(studied)], kinds[(at + at // len(studied)) % len(kinds)], "train")
        for at in range(count if studied else 0)
    ]
    for place in range(len(passage.sentences)):
        purpose: Purpose = "left_out" if place in left_out else "exam"
        spread += [Task(place, kinds[at % len(kinds)], purpose) for at in range(exam[place])]
    return tuple(spread)


def second_tasks(first: Sequence[Task], without: Collection[int], kinds: Sequence[str]) -> tuple[Task, ...]:
    """The second round: each sentence `without` a question is asked about once more in every kind, at most three.

    Kinds that it was not asked in come first.
    """
    tasks = []
    for place in sorted(without):
        tried = [task.kind for task in first if task.sentence == place and task.purpose == "train"]
        fresh = sorted(kinds, key=lambda kind: (tried.count(kind), kinds.index(kind)))
        tasks += [Task(place, kind, "train") for kind in fresh[:3]]
    return tuple(tasks)


def asked_key(passage: Passage, tasks: Sequence[Task], frame: Frame, number: int, identity: Sequence[Any]) -> str:
    """The key of `Asked`. `identity`: what else it follows from (prompts, base, quantization, seed)."""
    said = [[task.sentence, task.kind, task.purpose] for task in tasks]
    return key_of("asked", passage.key, said, frame, number, QUESTION_TOKENS, TEMPERATURE, *identity)


def ask(teacher: Teacher, frame: Frame, passage: Passage, tasks: Sequence[Task], key: str, number: int) -> Asked:
    """Asks all `tasks` of a passage; each is drawn with a seed of its own. Raises RowError for a template's refusal."""
    prompts = prompts_for(passage.language)
    written: dict[int, str] = {}
    # One wording at a time: prompts of one wording share the passage and the worked examples.
    for wording in sorted({task.wording for task in tasks}):
        places = [place for place, task in enumerate(tasks) if task.wording == wording]
        texts = [
            prompts.ask(frame, passage, passage.sentences[tasks[place].sentence], tasks[place].kind, wording)
            for place in places
        ]
        seeds = [int(key_of(key, place)[:16], 16) for place in places]
        answers = teacher.sample(frame, texts, seeds, QUESTION_TOKENS, TEMPERATURE)
        written |= dict(zip(places, answers, strict=True))
    return _asked(passage, tasks, [written[place] for place in range(len(tasks))], frame, key, number)


def _asked(
    passage: Passage, tasks: Sequence[Task], written: Sequence[str], frame: Frame, key: str, number: int
) -> Asked:
    questions, unasked = [], []
    for place, (task, text) in enumerate(zip(tasks, written, strict=True)):
        found = question_in(text) or (text.strip() if frame == "lines" else None)
        if found:
            own = key_of(key, place, found)
            asked = Question(own, passage.key, task.sentence, task.kind, task.purpose, number, found)
            questions.append(asked)
        else:
            unasked.append(Unasked(task.sentence, task.kind, text[:_SHOWN]))
    return Asked(key, passage.key, number, tuple(questions), tuple(unasked))
