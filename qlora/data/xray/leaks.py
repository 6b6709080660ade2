"""What evaluation rows have in common with training rows: an answer that was trained is no test of anything new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from qlora.data.token_cache import FlatRows, PreparedSplit
from qlora.data.xray.tokens import BATCH_ROWS, RowFacts, runs

WINDOW = 8  # tokens of an answer, without its first and its last, that are no chance any more in another text
_TABLE_BITS = 20
_MOST_LOOKED_AT = 4096  # places of a batch, which are compared one by one


@dataclass(frozen=True)
class Leaks:
    """Numbers of the evaluation rows of which training has

    rows       every token
    questions  all that stands before the last answer
    answers    the last answer, as an answer of its own
    inside     the last answer, of ten tokens or more, somewhere in a row and not as an answer
    """

    rows: tuple[int, ...]
    questions: tuple[int, ...]
    answers: tuple[int, ...]
    inside: tuple[int, ...]


def find(train: PreparedSplit, evaluation: PreparedSplit, facts: tuple[RowFacts, RowFacts], answers: Any) -> Leaks:
    """`facts`: of the training rows and of the evaluation rows; `answers`: hashes of all trained answers."""
    trained, asked = facts
    same = numpy.isin(asked.answers, answers)
    rows = numpy.isin(asked.rows, trained.rows)
    questions = numpy.isin(asked.questions, trained.questions) & (asked.questions != 0)
    inside = _inside(train, evaluation, asked, ~same & ~rows)
    numbers = [tuple(numpy.flatnonzero(found).tolist()) for found in (rows, questions, same)]
    return Leaks(numbers[0], numbers[1], numbers[2], inside)


def _inside(train: PreparedSplit, evaluation: PreparedSplit, asked: RowFacts, wanted: Any) -> tuple[int, ...]:
    """Of the `wanted` evaluation rows those whose answer stands in a training row.

    Its first and last token are left out: beside other text they may be tokenized otherwise.
    """
    answers: dict[int, list[tuple[int, Any]]] = {}
    for number in numpy.flatnonzero(wanted).tolist():
        inner = slice(int(asked.starts[number]) + 1, int(asked.stops[number]) - 1)
        ids = numpy.asarray(evaluation.rows[number].input_ids[inner], dtype=numpy.int32)
        if len(ids) >= WINDOW:
            answers.setdefault(int(runs(ids[:WINDOW], WINDOW)[0]), []).append((number, ids))
    table = numpy.zeros(1 << _TABLE_BITS, bool)
    table[[key & (len(table) - 1) for key in answers]] = True
    found: set[int] = set()
    for batch in train.flat(BATCH_ROWS) if answers else ():
        found |= _in_batch(batch, answers, table)
    return tuple(sorted(found))


def _in_batch(batch: FlatRows, answers: dict[int, list[tuple[int, Any]]], table: Any) -> set[int]:
    keys = runs(batch.ids, WINDOW)
    places = numpy.flatnonzero(table[keys & numpy.uint64(len(table) - 1)])[:_MOST_LOOKED_AT]
    row_ends = batch.starts[numpy.searchsorted(batch.starts, places, side="right")]
    found: set[int] = set()
    for place, row_end in zip(places.tolist(), row_ends.tolist(), strict=True):
        waiting = answers.get(int(keys[place]), [])
        for number, ids in waiting:
            end = place + len(ids)
            if number not in found and end <= row_end and numpy.array_equal(batch.ids[place:end], ids):
                found.add(number)
    for waiting in answers.values():
        waiting[:] = [one for one in waiting if one[0] not in found]
    return found
