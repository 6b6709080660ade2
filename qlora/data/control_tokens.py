"""Special tokens of a base that stand in somebody's text: which there are, what is said of them, and how to break them.

A tokenizer reads `<|im_end|>` as the token that ends a turn wherever it stands, and so do transformers' chat templates
and llama.cpp's server with what a user types. In a conversation it is therefore left as it is: what is trained is what
is served. A plain text may have been rendered before, and needs its tokens. A document has no use for any: a space
after its first sign makes plain text of it, for the base's tokenizer as for any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qlora.data.formats import Conversation, Message
from qlora.data.template_facts import BLOCKS
from qlora.data.unread import BROKEN, CONTROL, RENDERED, TAUGHT, Remark

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer

_PASSES = 8  # what is left may be a token again ("<<s>s>"): as often as it takes, and not without end
# Signs of thoughts stand in answers by right, and are read apart from their words (`spans.py`).
_OF_THOUGHTS = frozenset(sign for block in BLOCKS for sign in block)


def broken_up(chat: ChatTokenizer, text: str) -> str:
    """The text with each special token of the base in it broken up, and each sign that its template steers with."""
    signs = _signs(chat.tokenizer, chat.template or "")
    for _ in range(_PASSES if signs is not None else 0):
        assert signs is not None
        before, text = text, signs.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        if text == before:
            break
    return text


def steering(chat: ChatTokenizer, text: str) -> list[str]:
    """What `broken_up` breaks of a text at first, in its order."""
    signs = _signs(chat.tokenizer, chat.template or "")
    return [] if signs is None else signs.findall(text)


def told(chat: ChatTokenizer, conversation: Conversation, is_document: bool) -> Conversation:
    """A row as it is to be tokenized, with remarks on the special tokens in it; the very same where it has none."""
    if conversation.text is not None:
        if not is_document:
            return _remarked(conversation, RENDERED, _special(chat.tokenizer, (conversation.text,)))
        found = steering(chat, conversation.text)
        text = broken_up(chat, conversation.text) if found else conversation.text
        return _remarked(replace(conversation, text=text) if found else conversation, BROKEN, found)
    answers = [one for one in conversation.messages if one["role"] == "assistant" and one.get("train", True)]
    others = [one for one in conversation.messages if not any(one is answer for answer in answers)]
    conversation = _remarked(conversation, TAUGHT, _special(chat.tokenizer, _texts(answers)))
    return _remarked(conversation, CONTROL, _special(chat.tokenizer, _texts(others)))


def _texts(messages: Iterable[Message]) -> Iterable[str]:
    return (text for message in messages for text in (message["content"], message.get("reasoning_content") or ""))


def _remarked(conversation: Conversation, kind: str, tokens: Iterable[str]) -> Conversation:
    remarks = tuple(Remark(kind, token) for token in sorted(set(tokens)))
    return replace(conversation, remarks=(*conversation.remarks, *remarks)) if remarks else conversation


def _special(tokenizer: Any, texts: Iterable[str]) -> set[str]:
    """Special tokens in texts. Most texts have not even a first sign of one, which is looked for much faster."""
    pattern, firsts = _special_tokens(tokenizer)
    if pattern is None:
        return set()
    return {one for text in texts if any(sign in text for sign in firsts) for one in pattern.findall(text)}


@lru_cache(maxsize=2)
def _special_tokens(tokenizer: Any) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} - _OF_THOUGHTS
    tokens = {token for token in tokens if len(token) > 1 and token.strip() == token}
    return _any_of(tokens), frozenset(token[0] for token in tokens)


@lru_cache(maxsize=2)
def _signs(tokenizer: Any, template: str) -> re.Pattern[str] | None:
    """What is special to a tokenizer; and of its other added tokens (Gemma has `<table>` and blanks among them) the
    signs that its template steers with, such as `<think>`."""
    tokens = set()
    for token in tokenizer.added_tokens_decoder.values():
        text = str(token)
        steers = token.special or (text in template and not text[:1].isalnum())
        if steers and len(text) > 1 and text.strip() == text:
            tokens.add(text)
    return _any_of(tokens)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    listed = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, listed))) if listed else None
