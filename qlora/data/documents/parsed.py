"""What a reader makes of one file's bytes, and how it says that it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from qlora.data.documents.blocks import Block


class NotReadable(Exception):
    """A file that gives no text. `reason` follows the file's name and a colon; `hint` says what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True)
class Parsed:
    """`pages` is 0 where the kind of file has none. `left_out`: (what, in words that follow a number, and how many)."""

    blocks: list[Block]
    pages: int = 0
    left_out: tuple[tuple[str, int], ...] = ()
