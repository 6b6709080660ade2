"""Markdown (CommonMark and GitHub's tables) by markdown-it: its tokens become blocks.

Links give their words and no address; pictures give nothing. Front matter is left out, but for a title where the text
has no heading of the first level. Footnotes, which CommonMark would take for addresses, become paragraphs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qlora.data.documents.blocks import Block, table
from qlora.data.documents.decoding import decoded
from qlora.data.documents.parsed import Parsed
from qlora.data.documents.tags import blocks_of_tags, text_of_tags

_FRONT = re.compile(r"\A(---|\+\+\+)[ \t]*\n(.*?)\n(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_CHARACTERS = 20_000  # more between two lines of dashes is text
_TITLE = re.compile(r"""^title\s*[:=]\s*(["']?)(.+?)\1\s*$""", re.MULTILINE)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_NOTE = re.compile(r" {0,3}\[\^[^\]\s]{1,100}\]:[ \t]*")
_MARK = re.compile(r"\[\^[^\]\s]{1,100}\]")
_MAX_NESTING = 60  # markdown-it's own bound of 20 loses what stands deeper


def parse(data: bytes) -> Parsed:
    """Blocks of a Markdown file."""
    text, told = decoded(data)
    return Parsed(markdown_blocks(text), left_out=told)


def markdown_blocks(text: str) -> list[Block]:
    """Blocks of Markdown text."""
    from markdown_it import MarkdownIt

    text = text.replace("\r\n", "\n").replace("\r", "\n")
    title = ""
    front = _FRONT.match(text)
    if front and len(front[2]) <= _FRONT_CHARACTERS and (":" in front[2] or "=" in front[2]):
        text = text[front.end() :]
        title = found[2] if (found := _TITLE.search(front[2])) else ""
    reader = MarkdownIt("commonmark", {"maxNesting": _MAX_NESTING}).enable(["table", "strikethrough"])
    blocks = _Walk(reader.parse(_without_notes(text))).blocks
    if title and not any(block.kind == "heading" and block.level == 1 for block in blocks):
        blocks.insert(0, Block("heading", title, 1))
    return blocks


def _without_notes(text: str) -> str:
    """Footnotes as paragraphs of their own, and the marks that lead to them taken out; code stays as it is."""
    if "[^" not in text:
        return text
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if mark and (not fence or (mark[1][0] == fence[0] and len(mark[1]) >= len(fence))):
            fence = "" if fence else mark[1]
        elif not fence and not line.startswith(("    ", "\t")):
            if note := _NOTE.match(line):
                lines.append("")
                line = line[note.end() :]
            line = _MARK.sub("", line)
        lines.append(line)
    return "\n".join(lines)


class _Walk:
    """One walk along the tokens, which are flat: `_open` and `_close` around what they hold."""

    def __init__(self, tokens: Sequence[Any]) -> None:
        self.blocks: list[Block] = []
        self.lists: list[int | None] = []  # of each open list: number of its next item, None where it has no numbers
        self.marker = ""  # of an item whose first text has not come yet
        self.in_item = False
        self.level = 0  # of the heading that is open
        self.rows: list[list[str]] | None = None
        for token in tokens:
            self.take(token)

    def take(self, token: Any) -> None:
        kind = token.type
        if kind in ("bullet_list_open", "ordered_list_open"):
            self.lists.append(int(token.attrs.get("start", 1)) if kind.startswith("ordered") else None)
        elif kind in ("bullet_list_close", "ordered_list_close"):
            self.lists.pop()
        elif kind == "list_item_open":
            number = self.lists[-1]
            self.marker, self.in_item = (f"{number}. " if number is not None else ""), True
            if number is not None:
                self.lists[-1] = number + 1
        elif kind == "heading_open":
            self.level = int(token.tag[1])
        elif kind == "heading_close":
            self.level = 0
        elif kind == "inline":
            self.inline(_inline(token.children or ()))
        elif kind in ("fence", "code_block"):
            self.blocks.append(Block("code", token.content))
        elif kind == "html_block":
            self.blocks += blocks_of_tags(token.content)
        else:
            self.table(kind)

    def table(self, kind: str) -> None:
        if kind == "table_open":
            self.rows = []
        elif kind == "tr_open" and self.rows is not None:
            self.rows.append([])
        elif kind == "table_close" and self.rows is not None:
            self.blocks.append(table(self.rows, has_header=any(self.rows[0]) if self.rows else None))
            self.rows = None

    def inline(self, text: str) -> None:
        if self.rows is not None:
            self.rows[-1].append(text)
        elif self.in_item and self.lists:
            self.blocks.append(Block("item", self.marker + text, len(self.lists)))
            self.in_item = False
        elif self.level:
            self.blocks.append(Block("heading", text, self.level))
        else:
            # Two line breaks one after the other are what others write as an empty line.
            self.blocks += [Block("paragraph", part) for part in re.split(r"\n\s*\n", text)]


def _inline(children: Sequence[Any]) -> str:
    parts = []
    for token in children:
        if token.type in ("text", "code_inline"):
            parts.append(token.content)
        elif token.type in ("softbreak", "hardbreak"):
            parts.append(" " if token.type == "softbreak" else "\n")
        elif token.type == "html_inline":
            parts.append(text_of_tags(token.content))
    return "".join(parts)
