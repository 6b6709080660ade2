"""Rows of a study: what the base answered with a passage in view becomes what it is to answer without it.

Three sorts, in this order: each kept question alone; some of them with the passage beside two others, so that a tuned
model still reads what a search gives it; and prompts on other things as the base answers them. Answers are the tokens
that the base wrote, so that each label stands at its token. `rows.jsonl` is the same as conversations, for any trainer.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from qlora import disk
from qlora.data.chat import TokenRow
from qlora.data.prepare import PreparedData, PreparedSplit
from qlora.data.token_cache import Prompt, RowLabels
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import SourceSection
from qlora.study.labels import Labels, one_token
from qlora.study.material import FOLDER

T = TypeVar("T")
ReadLabels = Callable[[str], Labels]  # by the key of a row
ROWS_FILE = "rows.jsonl"
MEASURED_ROWS = 200  # of a study, on which an export is compared with the trained model
DISTRACTORS = 2  # passages beside a question's own; RAFT found 1 to 3 of use (2403.10131, section 5)


@dataclass(frozen=True)
class StudyRow:
    """What is asked, as a user says it and as tokens, with the answer as words and as tokens with the one that ends it.

    `lead_ids`: what the template writes of an answer before its words: trained, and certain. `key`: of its labels in
    the store, where they stay until a step reads them: 384 bytes a token, 56 MB for 100 pages.
    """

    asked: str
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    key: str
    lead_ids: tuple[int, ...] = ()

    @property
    def trained(self) -> int:
        return len(self.lead_ids) + len(self.answer_ids)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + self.trained


@dataclass(frozen=True)
class Shares:
    """How many rows of a whole show a passage, and how many are on other things."""

    with_passage: float
    hold: float

    def counts(self, questions: int) -> tuple[int, int]:
        """Rows with a passage and rows on other things, beside `questions` rows of a question alone."""
        whole = questions / (1 - self.with_passage - self.hold)
        return round(whole * self.with_passage), round(whole * self.hold)


def in_drawn_order(keys: Sequence[str], seed: int, purpose: str) -> list[int]:
    """Places of `keys` in an order that follows from seed and purpose: one key more or less moves no other."""
    digests = [hashlib.sha256(f"{seed} {purpose} {key}".encode()).digest() for key in keys]
    return sorted(range(len(keys)), key=digests.__getitem__)


def among_others(own: T, others: Sequence[T], seed: int, key: str) -> list[T]:
    """`own` and the first DISTRACTORS of the others that are not it, in a drawn order."""
    shown = [own, *[other for other in others if other != own][:DISTRACTORS]]
    return [shown[at] for at in in_drawn_order([str(place) for place in range(len(shown))], seed, key)]


def write(folder: Path, rows: Sequence[StudyRow]) -> None:
    """`rows.jsonl` in the study's folder, as conversations."""
    lines = (
        {"messages": [{"role": "user", "content": row.asked}, {"role": "assistant", "content": row.answer}]}
        for row in rows
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    disk.write_atomic(folder / ROWS_FILE, text)


def split_of(rows: Sequence[StudyRow], source: int, read: ReadLabels | None) -> PreparedSplit:
    """Rows of tokens, of the source with that number; with `read` also their labels, each read when it is asked for."""
    lengths = [row.length for row in rows]
    trained = [row.trained for row in rows]
    tokens = array("i", (token for row in rows for token in (*row.prompt_ids, *row.lead_ids, *row.answer_ids)))
    prompts = (Prompt([{"role": "user", "content": row.asked}], None, row.answer) for row in rows)
    keys, leads = [row.key for row in rows], [row.lead_ids for row in rows]

    def labels(row: int) -> RowLabels:
        assert read is not None
        found = read(keys[row])
        places = [one_token(token) for token in leads[row]]
        ids = np.vstack([*(ids for ids, _ in places), found.ids])
        return RowLabels(ids, np.vstack([*(logprobs for _, logprobs in places), found.logprobs]))

    return PreparedSplit(
        rows=_flat_rows(tokens, list(accumulate(lengths, initial=0)), trained),
        lengths=lengths,
        trained=trained,
        wheres=[f"{ROWS_FILE}:{number}" for number in range(1, len(rows) + 1)],
        sources=[source] * len(rows),
        prompts=[json.dumps(prompt._asdict(), ensure_ascii=False) for prompt in prompts],
        labels=None if read is None else labels,
    )


def with_rows_of(
    data: PreparedData, rows: Sequence[StudyRow], source: int, read: ReadLabels | None = None
) -> PreparedData:
    """The prepared rows of a recipe's own sources and those of its study behind them; their labels by `read`, where
    they are soft."""
    study = split_of(rows, source, read)
    content = hashlib.sha256(str(read is not None).encode())
    for row in rows:
        content.update(array("i", [len(row.prompt_ids), *row.prompt_ids, *row.lead_ids, *row.answer_ids]).tobytes())
        if read is not None:
            labels = read(row.key)
            content.update(labels.ids.tobytes() + labels.logprobs.tobytes())
    own = (data.fingerprint, data.content_fingerprint, data.older_fingerprint)
    prints = [disk.sha256_text(f"{one} {content.hexdigest()}") for one in own]
    return PreparedData(_joined(data.train, study), data.eval, prints[0], prints[1], prints[2], data.reports)


def as_exported(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe of a run with its study's rows as one more source, for an export to measure with.

    Not where rows of files are evaluated: these are what the run delivered the loss of.
    """
    file, data = run_dir / FOLDER / ROWS_FILE, recipe.data
    if not data.documents or (data.train and (data.eval or data.eval_fraction)) or not file.is_file():
        return recipe
    train = (*data.train, SourceSection(path=str(file), format="messages"))
    return recipe.model_copy(update={"data": data.model_copy(update={"train": train, "eval_fraction": 0.0})})


def measured_on(recipe: Recipe, data: PreparedData) -> PreparedData:
    """The data of a run with documents with its first rows to evaluate on, where it has none."""
    if any(data.eval.trained) or not recipe.data.documents:
        return data
    few = range(min(MEASURED_ROWS, len(data.train.lengths)))
    return replace(data, eval=_chosen(data.train, few))


def _chosen(split: PreparedSplit, rows: Sequence[int]) -> PreparedSplit:
    of = split.labels
    return PreparedSplit(
        rows=[split.rows[row] for row in rows],
        lengths=[split.lengths[row] for row in rows],
        trained=[split.trained[row] for row in rows],
        wheres=[split.wheres[row] for row in rows],
        sources=[split.sources[row] for row in rows],
        prompts=[split.prompts[row] if split.prompts else "" for row in rows],
        labels=None if of is None else lambda row: of(rows[row]),
    )


def _joined(first: PreparedSplit, second: PreparedSplit) -> PreparedSplit:
    before = len(first.lengths)
    labels = second.labels
    return PreparedSplit(
        rows=_chain(first.rows, second.rows),
        lengths=[*first.lengths, *second.lengths],
        trained=[*first.trained, *second.trained],
        wheres=_chain(first.wheres, second.wheres),
        sources=[*first.sources, *second.sources],
        prompts=_chain(first.prompts, second.prompts),
        labels=None if labels is None else lambda row: labels(row - before) if row >= before else None,
    )


class _Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self._make(at) for at in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(index % self._count)


def _flat_rows(tokens: array[int], starts: Sequence[int], trained: Sequence[int]) -> Sequence[TokenRow]:
    """Rows whose tokens lie behind each other, four bytes each; the last `trained` of each have a loss."""

    def row(at: int) -> TokenRow:
        ids = tokens[starts[at] : starts[at + 1]].tolist()
        return TokenRow(ids, [0.0] * (len(ids) - trained[at]) + [1.0] * trained[at])

    return _Lazy(len(trained), row)


def _chain(first: Sequence[Any], second: Sequence[Any]) -> Sequence[Any]:
    before = len(first)
    return _Lazy(before + len(second), lambda at: first[at] if at < before else second[at - before])
