"""What process 0 hands to the others: rows of a study, what a reference said, and how drawn answers were judged.

The first two are its own work, in the run's folder, which may be on another machine: they travel as they are, are kept
in memory (of soft labels 384 bytes a token: 56 MB for 100 pages), and are known by the fingerprint of the rows that
they become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlora.data.prepare import PreparedData
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import SourceSection
from qlora.study.labels import COLUMNS, Labels
from qlora.study.lesson import Learnt
from qlora.study.rows import StudyRow, with_rows_of
from qlora.training import reference
from qlora.training.answered import Answer
from qlora.training.dividing import Joint, Word
from qlora.training.setup import Job

_IDS = np.dtype(np.int32).itemsize
_TOKEN_BYTES = _IDS + COLUMNS * (_IDS + np.dtype(np.float16).itemsize)  # of a token of `Labels`


@dataclass(frozen=True)
class Handed:
    """The lesson of a run as a process knows it that has not studied: for `setup.prepare_job`."""

    recipe: Recipe  # with the study's rows as its last source
    rows: Sequence[StudyRow]
    labels: dict[str, Labels] | None  # by the key of a row, where they are soft
    batches: tuple[Any, ...] = ()  # nothing is asked here

    def foreseen(self, data: PreparedData) -> tuple[Recipe, PreparedData]:
        read = None if self.labels is None else self.labels.__getitem__
        return self.recipe, with_rows_of(data, self.rows, len(self.recipe.data.train) - 1, read)

    def teacher(self, *_: object) -> None:
        """Nobody."""

    def learn(self, _teacher: None, _run: Path, _base: Any, data: PreparedData, _phase: Any) -> tuple[Any, ...]:
        return (*self.foreseen(data), None)


def learnt_by(job: Job) -> Learnt | None:
    return None if job.exam is None else job.exam.learnt


def without_documents(recipe: Recipe, learnt: Learnt | None) -> Word:
    """A run's recipe for a process that has not studied: without its documents, and the source of their rows."""
    own: Word = recipe.model_dump(mode="json", exclude_none=True)
    if not recipe.data.documents:  # as in a run's recipe.toml
        return {name: value for name, value in own.items() if name not in ("study", "exam")}
    data = {name: value for name, value in own["data"].items() if name != "documents"}
    if learnt is not None:
        data["train"] = data["train"][:-1]
    return {**{name: value for name, value in own.items() if name not in ("study", "exam")}, "data": data}


def told(recipe: Recipe, learnt: Learnt | None) -> Word | None:
    """What is said of a study beside its labels."""
    if learnt is None:
        return None
    source = recipe.data.train[-1].model_dump(mode="json", exclude_none=True)
    return {"source": source, "rows": [asdict(row) for row in learnt.rows], "soft": recipe.study.labels == "soft"}


def give(joint: Joint, recipe: Recipe, learnt: Learnt | None) -> None:
    """The soft labels of what was told."""
    if learnt is None or recipe.study.labels != "soft":
        return
    parts = []
    for row in learnt.rows:
        labels = learnt.labels(row.key)
        parts += [labels.token_ids.tobytes(), labels.ids.tobytes(), labels.logprobs.tobytes()]
    joint.copy(torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8))


def taken(joint: Joint, recipe: Recipe, word: Word | None) -> Handed | None:
    """What process 0 gives, with `recipe` its `without_documents`."""
    if word is None:
        return None
    rows = [StudyRow(**{key: _tuple(value) for key, value in row.items()}) for row in word["rows"]]
    source = SourceSection.model_validate(word["source"])
    data = recipe.data.model_copy(update={"train": (*recipe.data.train, source)})
    whole = recipe.model_copy(update={"data": data})
    if not word["soft"]:
        return Handed(whole, rows, None)
    tokens = [len(row.answer_ids) for row in rows]
    content = torch.zeros(sum(tokens) * _TOKEN_BYTES, dtype=torch.uint8)
    joint.copy(content)
    ends = np.cumsum(tokens) * _TOKEN_BYTES
    parts = np.split(content.numpy(), ends[:-1])
    return Handed(whole, rows, {row.key: _labels(part) for row, part in zip(rows, parts, strict=True)})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _labels(content: NDArray[np.uint8]) -> Labels:
    """Those of T tokens, behind each other in one buffer, of which they are views."""
    count = len(content) // _TOKEN_BYTES
    first, second = count * _IDS, count * _IDS * (1 + COLUMNS)
    ids = content[first:second].view(np.int32).reshape(count, COLUMNS)
    return Labels(content[:first].view(np.int32), ids, content[second:].view(np.float16).reshape(count, COLUMNS))


def give_reference(joint: Joint, tell: Any, data: PreparedData) -> None:
    """What the reference said of all rows, where an objective compares with it."""
    said = reference.told(data)
    tell({"do": "judged", "sizes": {name: len(one) for name, one in said.items()}})
    for one in said.values():
        joint.copy(one)


def taken_reference(joint: Joint, word: Word) -> reference.Logprobs:
    found = {name: torch.zeros(size) for name, size in word["sizes"].items()}
    for one in found.values():
        joint.copy(one)
    return found


def give_answers(joint: Joint, tell: Any, drawn: tuple[int, Sequence[Answer]]) -> None:
    """What was drawn for the steps from a first one on: 8 bytes a number, of 64 answers of 256 tokens 0.3 to 0.5 MB."""
    first, answers = drawn
    values = torch.tensor([value for answer in answers for value in _numbers(answer)], dtype=torch.float64)
    tell({"do": "answers", "first": first, "size": len(values)})
    joint.copy(values)


def taken_answers(joint: Joint, word: Word, prompt_of: Callable[[int], tuple[int, ...]]) -> list[Answer]:
    """What process 0 gives, with the prompts of rows that are here too."""
    values = torch.zeros(word["size"], dtype=torch.float64)
    joint.copy(values)
    rest, found = iter(values.tolist()), []
    for row in rest:
        found.append(_answer(int(row), prompt_of, rest))
    return found


def _numbers(answer: Answer) -> Iterator[float]:
    """All that a step needs to know of it, whole numbers among it below 2^53."""
    yield from (answer.row, answer.number, answer.ended, answer.reward, answer.advantage)
    for values in (answer.token_ids, answer.logprobs, answer.reference, answer.old):
        yield len(values)
        yield from values


def _answer(row: int, prompt_of: Callable[[int], tuple[int, ...]], rest: Iterator[float]) -> Answer:
    number, ended, reward, advantage = islice(rest, 4)
    token_ids, logprobs, reference, old = (tuple(islice(rest, int(next(rest)))) for _ in range(4))
    return Answer(
        row=row,
        number=int(number),
        prompt_ids=prompt_of(row),
        token_ids=tuple(map(int, token_ids)),
        ended=bool(ended),
        logprobs=logprobs,
        reward=reward,
        advantage=advantage,
        reference=reference,
        old=old,
    )
