"""Rendered texts as tokens and where each one stands in its text, by a tokenizer that a stranger made."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from qlora.data.known_words import Places
from qlora.errors import TokenizerError, foreign_failures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and the characters of each


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[Tokens]:
    """Ids and character offsets of each text, without the tokenizer's own BOS and EOS.

    Raises TokenizerError where the library gives up on a text: its engine for patterns does so after ten million
    trials, as a panic.
    """
    if not texts:
        return
    with foreign_failures() as failure:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if failure.error:
        what = f"the base's tokenizer gave up on a row ({failure.reason})"
        raise TokenizerError(what, "use another base, or find the row: halve the data") from failure.error
    yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


def begin_of(offsets: Sequence[tuple[int, int]], at: int) -> int:
    """Where token `at` begins.

    Tokenizers that trim offsets leave a token of spaces no width, at its end: it begins where the last one ended.
    """
    begin, end = offsets[at]
    return begin if begin < end or not at else offsets[at - 1][1]


def ended_at(offsets: Sequence[tuple[int, int]], place: int) -> int:
    """How many tokens have ended at a place in the text. Looks at a few: a row has thousands."""
    if isinstance(offsets, Places):
        return offsets.ended_at(place)
    return bisect_right(offsets, place, key=lambda pair: pair[1])


def begun_before(offsets: Sequence[tuple[int, int]], place: int) -> int:
    """How many tokens begin before a place in the text."""
    if isinstance(offsets, Places):
        near = range(offsets.first_near(place), len(offsets))
        return next((at for at in near if begin_of(offsets, at) >= place), len(offsets))
    return bisect_left(range(len(offsets)), place, key=lambda at: begin_of(offsets, at))


def split_at(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Tokens, borders: Sequence[int]) -> Tokens:
    """The text's tokens, with none that reaches over one of `borders` (characters), so that each part is tokenized as
    it would be alone: a server's prompt ends there, and the model goes on from its tokens.

    The tokens stay as they are where the parts would read otherwise than the whole (a tokenizer that puts a space
    before every text).
    """
    ids, offsets = tokens
    over = []
    for border in borders:
        at = ended_at(offsets, border)
        if at < len(ids) and begin_of(offsets, at) < border:
            over.append(border)
    if not over:
        return tokens
    places = [0, *over, len(text)]
    new_ids: list[int] = []
    new_offsets: list[tuple[int, int]] = []
    parts = tokens_of(tokenizer, [text[start:end] for start, end in pairwise(places)])
    for start, (part_ids, part_offsets) in zip(places, parts, strict=False):
        new_ids += part_ids
        new_offsets += [(start + begin, start + end) for begin, end in part_offsets]
    return (new_ids, new_offsets) if tokenizer.decode(new_ids) == tokenizer.decode(ids) else tokens
