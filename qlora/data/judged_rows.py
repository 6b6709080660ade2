"""Tokens of answers to be compared: a pair is two rows, one behind the other, and what is left of a pair is none.

The sign of a row's weights says how good its answer is: that of a worse or a bad one is negative (`loader.collate`
gives the step both, apart). The rows of a pair have one `file:line`, so that no split for evaluation parts them.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from qlora.data.chat import ChatTokenizer, TokenRow
from qlora.data.formats import Conversation
from qlora.data.judged import Judged
from qlora.data.limits import TextLimits
from qlora.data.row_json import RowError, RowTooLong
from qlora.data.token_cache import MadeRow, Preference, PreparedSplit
from qlora.objective_keys import JUDGED

Placed = tuple[str, MadeRow | RowError]
SAME = "its two answers have the same tokens"
LONGER = 'raise data.max_length, or leave out what is over it: data.truncation = "drop"'


def rows(
    chat: ChatTokenizer, limits: TextLimits, batch: Sequence[tuple[str, Conversation | RowError]]
) -> Iterator[Placed]:
    """The rows of judged conversations, each with its place; one error for a pair of which either side has one."""
    judged = [item for _, item in batch if isinstance(item, Judged)]
    encoded = iter(chat.encode_many([side for item in judged for side, _ in item.sides], limits))
    for where, item in batch:
        if not isinstance(item, Judged):
            assert isinstance(item, RowError)
            yield where, item
            continue
        made = [(next(encoded), sign, side) for side, sign in item.sides]
        errors = [row for row, _, _ in made if isinstance(row, RowError)]
        if errors:
            yield where, min(errors, key=lambda error: isinstance(error, RowTooLong))
            continue
        tokens = [row.input_ids for row, _, _ in made if isinstance(row, TokenRow)]
        if len(tokens) == 2 and tokens[0] == tokens[1]:
            yield where, RowError(SAME)
            continue
        for row, sign, side in made:
            assert isinstance(row, TokenRow)
            plain = MadeRow.of(row, side)
            # A bad answer is nothing that evaluation could ask for.
            yield where, plain if sign > 0 else plain._replace(weights=_negative(plain.weights), prompt="")


def judged(split: PreparedSplit, formats: Collection[str], packing: bool) -> PreparedSplit:
    """A split of rows of these formats: what is known of its answers, where they are to be compared."""
    if not set(formats) or not set(formats) <= set(JUDGED):
        return split
    # Pairs and marked answers may stand beside each other in kto, which looks at each answer by itself.
    return replace(split, preference=Preference(set(formats) == {"preference"}, packing))


def _negative(weights: array[float]) -> array[float]:
    return array("f", (-weight for weight in weights))


def in_length(made: Iterable[Placed], max_length: int, cuts: bool) -> Iterator[Placed]:
    """The rows, of a pair that is over `max_length` what is to be said of it: its longer side, where it is left out, an
    error where nothing of it can be compared once it is cut, else both, to be cut."""
    waiting: tuple[str, MadeRow] | None = None
    for where, row in made:
        if waiting is not None:
            assert isinstance(row, MadeRow) and where == waiting[0]
            yield from _pair(where, (waiting[1], row), max_length, cuts)
            waiting = None
        elif isinstance(row, MadeRow):
            waiting = where, row
        else:
            yield where, row


def _pair(where: str, pair: tuple[MadeRow, MadeRow], max_length: int, cuts: bool) -> Iterator[Placed]:
    longer = max(pair, key=lambda row: len(row.ids))
    if len(longer.ids) <= max_length or not cuts:
        yield from ((where, row) for row in (pair if len(longer.ids) <= max_length else (longer,)))
        return
    left = [row._replace(ids=row.ids[:max_length], weights=row.weights[:max_length]) for row in pair]
    if left[0].ids == left[1].ids:
        yield where, RowError(f"its two answers have the same first {max_length} tokens", hint=LONGER)
    elif not all(any(row.weights) for row in left):
        what = f"within max_length = {max_length} tokens one of its two answers has not begun"
        yield where, RowError(what, hint=LONGER)
    else:
        yield from ((where, row) for row in pair)
