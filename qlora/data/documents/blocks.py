"""The one form that every reader gives: a document as a list of blocks, and how it is written down as text.

Five kinds are enough for what is asked about: headings, paragraphs, list items, tables and code. A block travels from
the process that reads a file as one JSON array, so it holds plain values only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["heading", "paragraph", "item", "table", "code"]
MAX_LEVEL = 6  # of headings, as HTML and Markdown have them
MAX_HEADING = 200  # characters: what is longer is a paragraph that somebody made large
_NUMBERED = re.compile(r"\d{1,4}[.)] ")
_HEADER_CELL = 60  # characters: a longer cell names no column
# Ligatures of printed text, of which a base's tokenizer makes other tokens than of their letters.
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_JOINERS = "\u200c\u200d"  # Persian, Hindi and many emoji are spelled with these two


@dataclass(frozen=True)
class Block:
    """One block. `level`: of a heading 1 to 6, of a list item its depth from 1. `rows` of a table: the header first.

    A table without a header has an empty first row. `text` is one line, but for code and where a line was broken on
    purpose (an address); an item of a numbered list begins with its number.
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
            return f"{'  ' * (self.level - 1)}{'' if _NUMBERED.match(self.text) else '- '}{self.text}"
        if self.kind == "table":
            return "\n".join(" | ".join(row) for row in self.rows if row)
        return self.text

    def words(self) -> list[str]:
        """What stands in it, parted at blanks, in order."""
        return (" ".join(cell for row in self.rows for cell in row) if self.kind == "table" else self.text).split()


def one_line(text: str) -> str:
    """The text with every run of white space, also a no-break space, as one blank."""
    return " ".join(text.split())


def tidy(text: str) -> str:
    """The text's lines, each on one line, without those in which nothing stands."""
    return "\n".join(line for line in map(one_line, text.split("\n")) if line)


def plain(text: str) -> str:
    """Text without what nobody sees: controls, soft hyphens, marks of direction; composed, ligatures as letters."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).translate(_LIGATURES)
    return "".join(map(_seen, text))


def _seen(letter: str) -> str:
    kind = unicodedata.category(letter)
    if kind == "Cs":
        return "\ufffd"
    if kind == "Cc":
        return letter if letter in "\n\t" else "\n" if letter == "\x85" else " " if letter in "\x0b\x0c" else ""
    if kind in ("Zl", "Zp"):
        return "\n"
    return "" if kind == "Cf" and letter not in _JOINERS else letter


def finished(blocks: Iterable[Block]) -> list[Block]:
    """Blocks as a reader hands them out: plain text, none in which nothing stands, too long headings as paragraphs."""
    found = []
    for block in blocks:
        if block.kind == "code":
            text = "\n".join(line.expandtabs(4).rstrip() for line in plain(block.text).strip("\n").split("\n"))
        else:
            text = tidy(plain(block.text))
        if block.kind == "heading":
            text = one_line(text)
        rows = tuple(tuple(one_line(plain(cell)) for cell in row) for row in block.rows)
        kind, level = block.kind, min(block.level, MAX_LEVEL) if block.kind == "heading" else block.level
        if kind == "heading" and len(text) > MAX_HEADING:
            kind, level = "paragraph", 0
        if text.strip() or any(cell for row in rows for cell in row):
            found.append(Block(kind, text, level, rows))
    return found


def table(rows: Sequence[Sequence[str]], has_header: bool | None) -> Block:
    """Rows as a block of one width. `has_header` None: the file does not say, and the first row is looked at.

    A first row names columns when each of its cells is short, without a digit, and not like another.
    """
    kept = [[one_line(cell) for cell in row] for row in rows]
    kept = [row for row in kept if any(row)]
    width = max(map(len, kept), default=0)
    square = tuple(tuple(row + [""] * (width - len(row))) for row in kept)
    if has_header is None:
        has_header = len(square) > 1 and width > 1 and _names_columns(square[0])
    return Block("table", rows=square if has_header else ((), *square))


def _names_columns(row: Sequence[str]) -> bool:
    short = all(0 < len(cell) <= _HEADER_CELL and not any(letter.isdigit() for letter in cell) for cell in row)
    return short and len(set(row)) == len(row)


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
