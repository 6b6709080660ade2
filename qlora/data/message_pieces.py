"""Messages as the rendering process reads them, each written once: the prompts of a conversation are its beginnings.

Of a conversation of ten turns each message stands in some ten requests, and writing them was a tenth of all the work.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora.data.call_shapes import Reading, as_templates_read_it
from qlora.data.formats import Message
from qlora.data.render import value_text

KEPT_CHARS = 8 << 20


class MessagePieces:
    """JSON of messages, kept by which message it is: nobody changes one once it has been read."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Message, str]] = {}  # by id; the message itself keeps its id from being another's
        self._reading: Reading | None = None
        self._chars = 0

    def of(self, messages: Sequence[Message], reading: Reading) -> str:
        """The JSON of `as_templates_read_it`."""
        if any(shape.ids == "nine" for shape in reading.shapes.values()):
            return value_text(as_templates_read_it(messages, reading))  # a new id depends on the calls before it
        if reading is not self._reading or self._chars > KEPT_CHARS:
            self._kept, self._reading, self._chars = {}, reading, 0
        return f"[{', '.join(map(self._piece, messages))}]"

    def _piece(self, message: Message) -> str:
        kept = self._kept.get(id(message))
        if kept is None:
            assert self._reading is not None
            kept = message, value_text(as_templates_read_it([message], self._reading)[0])
            self._kept[id(message)] = kept
            self._chars += len(kept[1])
        return kept[1]
