"""Special tokens of a base in what it is asked and shown: read as text, never as the tokens that steer the model.

A document about chat templates may hold `<|im_end|>`: as a token it would end the turn in which it is shown. See
`data/control_tokens.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qlora.data.control_tokens import broken_up as plain
from qlora.data.control_tokens import steering as found
from qlora.events import Notice, Sink

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer

__all__ = ["found", "plain", "tell"]


def tell(chat: ChatTokenizer, texts: Iterable[str], whose: str, sink: Sink) -> None:
    """A notice of the special tokens in `texts`, which are `whose` ("the documents"); none where there are none."""
    signs = [sign for text in texts for sign in found(chat, text)]
    if signs:
        message = f"special tokens of the base stand in {whose}, such as {signs[0]}: read as plain text, with a blank"
        sink.emit(Notice("documents", f"{message} after their first sign", len(signs)))
