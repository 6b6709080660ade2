"""Rows taken apart token by token, as they are drawn: in the packs in which they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.data.token_cache import PreparedSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 4_096  # of a row are drawn
_MOST_JOINED = 16  # tokens that are read together before they are shown as they are: a letter has few


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that make whole letters: mostly one. `trained`: whether they are what the model learns."""

    text: str
    ids: tuple[int, ...]
    trained: bool


@dataclass(frozen=True)
class DrawnRow:
    """`source`: index in [[data.train]]; `tokens` and `trained` count the whole row, `pieces` may end before it."""

    where: str
    source: int
    tokens: int
    trained: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class DrawnPack:
    """The rows that share a row of tensors, unseen by each other; `documents` and `tokens` count all of them."""

    number: int
    documents: int
    tokens: int
    rows: tuple[DrawnRow, ...]


def draw(
    split: PreparedSplit, packs: Sequence[Sequence[int]], rows: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[DrawnPack, ...]:
    """The first `rows` rows of the packs of an epoch, in the order in which they are trained."""
    drawn: list[DrawnPack] = []
    for number, members in enumerate(packs, 1):
        if rows < 1:
            break
        tokens = sum(split.lengths[row] for row in members)
        shown = tuple(_row(split, row, tokenizer) for row in members[:rows])
        drawn.append(DrawnPack(number, len(members), tokens, shown))
        rows -= len(shown)
    return tuple(drawn)


def _row(split: PreparedSplit, row: int, tokenizer: PreTrainedTokenizerBase) -> DrawnRow:
    tokens = split.rows[row]
    ids, trained = tokens.input_ids[:MAX_TOKENS], [weight != 0 for weight in tokens.loss_weights[:MAX_TOKENS]]
    pieces = tuple(_pieces(ids, trained, tokenizer))
    worse = any(weight < 0 for weight in tokens.loss_weights)
    return DrawnRow(
        split.wheres[row] + (" (the worse answer)" if worse else ""),
        split.sources[row],
        split.lengths[row],
        split.trained[row],
        pieces,
    )


def _pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Text by text: what a token adds to the one before it, since some decoders write a space only between two."""

    def text(start: int, end: int) -> str:
        decoded = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)

    before = start = 0
    for end in range(1, len(ids) + 1):
        known, whole = text(before, start), text(before, end)
        goes_on = whole.endswith("\ufffd") and end < len(ids) and end - start < _MOST_JOINED
        if goes_on and trained[end] == trained[start]:
            continue  # the rest of a letter follows
        shown = whole.removeprefix(known) if whole.startswith(known) else text(start, end)
        yield Piece(shown, tuple(ids[start:end]), trained[start])
        before, start = start, end
