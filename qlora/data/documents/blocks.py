"""The one form that every reader gives: a document as a list of blocks, and how it is written down as text.

Five kinds are enough for what is asked about: headings, paragraphs, list items, tables and code. A block travels from
the process that reads a file as one JSON object, so it holds plain values only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["heading", "paragraph", "item", "table", "code"]
MAX_LEVEL = 6  # of headings, as HTML and Markdown have them
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Block:
    """One block. `level`: of a heading 1 to 6, of a list item its depth from 1. `rows` of a table: the header first.

    A table without a header has an empty first row. `text` is one line, but for code.
    """

    kind: Kind
    text: str = ""
    level: int = 0
    rows: tuple[tuple[str, ...], ...] = ()

    def lines(self) -> str:
        """The block as Markdown-like text."""
        if self.kind == "heading":
            return f"{'#' * self.level} {self.text}"
        if self.kind == "item":
            return f"{'  ' * (self.level - 1)}- {self.text}"
        if self.kind == "table":
            return "\n".join(" | ".join(row) for row in self.rows if row)
        return self.text

    def words(self) -> list[str]:
        """What stands in it, parted at blanks, in order."""
        return (" ".join(cell for row in self.rows for cell in row) if self.kind == "table" else self.text).split()


def one_line(text: str) -> str:
    """The text with every run of white space, also a no-break space, as one blank."""
    return _SPACE.sub(" ", text).strip()


def as_text(blocks: Iterable[Block]) -> str:
    """Blocks as Markdown-like text: an empty line between them, none between the items of a list."""
    parts: list[str] = []
    before = ""
    for block in blocks:
        if parts:
            parts.append("\n" if block.kind == before == "item" else "\n\n")
        parts.append(block.lines())
        before = block.kind
    return "".join(parts)


def without_empty(blocks: Sequence[Block]) -> list[Block]:
    """The blocks in which something stands."""
    return [block for block in blocks if block.text.strip() or any(cell for row in block.rows for cell in row)]
