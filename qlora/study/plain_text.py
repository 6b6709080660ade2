"""Special tokens of a base that stand in somebody's text: read as text, never as the tokens that steer the model.

A document about chat templates may hold `<|im_end|>`: as a token it would end the turn in which it is shown. A space
after its first sign makes plain text of it, for the base's tokenizer as for any other that reads the rows later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qlora.events import Notice, Sink

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer

_PASSES = 8  # what is left may be a token again ("<<s>s>"): as often as it takes, and not without end


def plain(chat: ChatTokenizer, text: str) -> str:
    """The text with each special token of the base in it broken up."""
    signs = _signs(chat.tokenizer, chat.template or "")
    for _ in range(_PASSES if signs is not None else 0):
        assert signs is not None
        before, text = text, signs.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        if text == before:
            break
    return text


def found(chat: ChatTokenizer, text: str) -> list[str]:
    """The special tokens that stand in a text, in their order."""
    signs = _signs(chat.tokenizer, chat.template or "")
    return [] if signs is None else signs.findall(text)


def tell(chat: ChatTokenizer, texts: Iterable[str], whose: str, sink: Sink) -> None:
    """A notice of the special tokens in `texts`, which are `whose` ("the documents"); none where there are none."""
    signs = [sign for text in texts for sign in found(chat, text)]
    if signs:
        message = f"special tokens of the base stand in {whose}, such as {signs[0]}: read as plain text, with a blank"
        sink.emit(Notice("documents", f"{message} after their first sign", len(signs)))


@lru_cache(maxsize=2)
def _signs(tokenizer: Any, template: str) -> re.Pattern[str] | None:
    """What is special to a tokenizer; and of its other added tokens (Gemma has `<table>` and blanks among them) the
    signs that its template steers with, such as `<think>`."""
    tokens = []
    for token in tokenizer.added_tokens_decoder.values():
        text = str(token)
        steers = token.special or (text in template and not text[:1].isalnum())
        if steers and len(text) > 1 and text.strip() == text:
            tokens.append(text)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None
