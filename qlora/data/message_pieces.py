"""Messages as the rendering process reads them, each written once: the prompts of a conversation are its beginnings.

Of a conversation of ten turns each message stands in some ten requests, and writing them was a tenth of all the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from qlora.data.call_shapes import Reading, as_templates_read_it
from qlora.data.formats import Message
from qlora.data.render import value_text

KEPT_CHARS = 8 << 20


class MessagePieces:
    """JSON of messages, kept by which message it is: nobody changes one once it has been read."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Message, str]] = {}  # by id; the message itself keeps its id from being another's
        self._reading: Reading | None = None
        self._depends = False  # whether what is written of a message depends on those before it
        self._chars = 0
        self._tools: tuple[Sequence[dict[str, Any]], str] | None = None  # of the conversation that was asked for last

    def of(self, messages: Sequence[Message], reading: Reading) -> str:
        """The JSON of `as_templates_read_it`."""
        if reading is not self._reading or self._chars > KEPT_CHARS:
            self._kept, self._reading, self._chars = {}, reading, 0
            self._depends = any(shape.ids == "nine" for shape in reading.shapes.values())
        if self._depends:
            return value_text(as_templates_read_it(messages, reading))
        kept = self._kept
        return f"[{', '.join([(kept.get(id(one)) or self._written(one, reading))[1] for one in messages])}]"

    def of_tools(self, tools: Sequence[dict[str, Any]]) -> str:
        """The JSON of a row's tools."""
        if self._tools is None or self._tools[0] is not tools:
            self._tools = tools, value_text(list(tools))
        return self._tools[1]

    def _written(self, message: Message, reading: Reading) -> tuple[Message, str]:
        if [*message] == ["role", "content"] and not reading.parts and "<think>" not in message["content"]:
            # A tenth of the time of what follows, for nearly every message; and the same.
            text = f'{{"role": {quoted(message["role"])}, "content": {quoted(message["content"])}}}'
        else:
            text = value_text(as_templates_read_it([message], reading)[0])
        self._kept[id(message)] = kept = message, text
        self._chars += len(text)
        return kept
