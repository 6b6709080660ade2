"""Rendered texts as tokens and where each one stands in its text, by a tokenizer that a stranger made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlora.errors import TokenizerError, foreign_failures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
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
