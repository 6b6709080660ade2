"""How large a row may become: looked at before it is rendered and tokenized, which take a thousand times its bytes.

A row of 20 MB took 5.3 GiB and 222 s, only to be dropped as too long: the offsets of a token take 200 bytes, and a
template without generation marks is rendered once for each answer. What is over a bound here could not be trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.formats import Conversation, Message
from qlora.data.row_json import RowError, RowTooLong

# JSON of a row becomes at most 24 times its bytes (`[],[],…`: 64 for each 3), so 200 MiB, in a second or two.
MAX_ROW_BYTES = 1 << 23
# A text of this size is tokenized in about 2 s and 0.4 GiB. Only where max_length needs it, more is let through.
MIN_TEXT_CHARS = 1 << 20
# Plain text has about 4 characters a token, indented code and tables up to 10.
TEXT_CHARS_PER_TOKEN = 16
# A text of so many times the longest token is over max_length, and is not tokenized to see that. Twice, because some
# tokenizers leave white space out; and texts below MIN_SKIPPED_CHARS cost nothing.
SKIPPED_TOKENS, MIN_SKIPPED_CHARS = 2, 1 << 17
# Of all renderings of one row, one up to each answer: some 5 s. A row of 128k tokens may have 500 answers.
MAX_RENDERED_CHARS = 1 << 28
# Rendered and tokenized in one go: rows together, each with its renderings.
CHUNK_CHARS = 4 << 20


@dataclass(frozen=True)
class TextLimits:
    """Characters above which a row is too long to be rendered, and its rendered text too long to be tokenized."""

    row_chars: int = MIN_TEXT_CHARS
    rendered_chars: int = 2 * MIN_TEXT_CHARS
    reason: str = "the chat template makes too much text of it"  # why a rendered text is too long


def text_limits(max_length: int, truncation: str, longest_token: int) -> TextLimits:
    """The limits for rows of `max_length` tokens. Rows that are cut are tokenized whole before."""
    row_chars = max(MIN_TEXT_CHARS, TEXT_CHARS_PER_TOKEN * max_length)
    certain = max(MIN_SKIPPED_CHARS, SKIPPED_TOKENS * max_length * longest_token)
    if truncation == "cut" or certain >= 2 * row_chars:
        return TextLimits(row_chars, 2 * row_chars)
    return TextLimits(row_chars, certain, f"over max_length = {max_length} tokens")


def text_chars(value: Any) -> int:
    """Characters of all text in a row's values."""
    count, level = 0, [value]
    while level:
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                count += len(item)
            elif isinstance(item, dict):
                deeper += item
                deeper += item.values()
            elif isinstance(item, list | tuple):
                deeper += item
            else:
                count += 4  # a number, true or null
        level = deeper
    return count


def _chars(message: Message) -> int:
    """`text_chars` of a message, sooner where it is a usual one."""
    usual = [*message] == ["role", "content"]
    return len("rolecontent") + len(message["role"]) + len(message["content"]) if usual else text_chars(message)


def rendered_chars(conversation: Conversation) -> int:
    """Characters of all renderings of a conversation: one of the whole, and up to one for each answer.

    Asked several times on a row's way, and counted once.
    """
    known = conversation.__dict__.get("rendered_chars")
    if known is None:
        chars = text_chars((conversation.text or "", conversation.tools or ())) + sum(
            map(_chars, conversation.messages)
        )
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        known = conversation.__dict__["rendered_chars"] = chars * (1 + len(answers))
    return int(known)


def check_size(conversation: Conversation, limit_chars: int) -> None:
    """Raise RowTooLong for more text than `limit_chars`, RowError for so many answers that it cannot be rendered."""
    rendered = rendered_chars(conversation)
    if rendered <= limit_chars:
        return
    answers = len([message for message in conversation.messages if message["role"] == "assistant"])
    chars = rendered // (1 + answers)
    if chars > limit_chars:
        raise RowTooLong(f"more than {limit_chars:,} characters of text in one row")
    if rendered > MAX_RENDERED_CHARS:
        raise RowError(f"{answers:,} answers in {chars:,} characters are too many for one row: split it")


def check_rendered(text: str, limits: TextLimits) -> None:
    """Raise RowTooLong for a rendered text that is not worth to be tokenized."""
    if len(text) > limits.rendered_chars:
        raise RowTooLong(limits.reason)


def chunks(conversations: Sequence[Conversation], rows: int) -> Iterator[Sequence[Conversation]]:
    """The conversations in parts of at most `rows` and about CHUNK_CHARS, at least one a part."""
    start = chars = 0
    for at, conversation in enumerate(conversations):
        more = rendered_chars(conversation)
        if at > start and (at - start == rows or chars + more > CHUNK_CHARS):
            yield conversations[start:at]
            start, chars = at, 0
        chars += more
    if start < len(conversations):
        yield conversations[start:]
