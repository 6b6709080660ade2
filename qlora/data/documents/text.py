"""Plain text: paragraphs parted by empty lines, list items by their signs, headings only where they are underlined."""

from __future__ import annotations

import re

from qlora.data.documents.blocks import Block
from qlora.data.documents.decoding import decoded
from qlora.data.documents.parsed import Parsed

_ITEM = re.compile(r"(\s*)(?:[-*+•▪◦‣·–—]\s+(?=\S)|(?=\d{1,3}[.)]\s+\S))")
_UNDERLINE = re.compile(r"(={3,}|-{3,}|~{3,})\s*")
_LEVELS = {"=": 1, "-": 2, "~": 3}
_FAR_SHORTER = 0.6  # of the longest line: a line that ends there was ended on purpose


def parse(data: bytes) -> Parsed:
    """Blocks of a text file."""
    text, told = decoded(data)
    blocks: list[Block] = []
    for part in re.split(r"\n[ \t]*\n\s*?(?=\S|[ \t])|\f", text.replace("\r\n", "\n").replace("\r", "\n")):
        blocks += _part(part)
    return Parsed(blocks, left_out=told)


def _part(part: str) -> list[Block]:
    """Blocks of lines between which there is no empty one."""
    lines = [line for line in part.split("\n") if line.strip()]
    if len(lines) > 1 and (drawn := _UNDERLINE.fullmatch(lines[1].strip())) and len(lines[0].strip()) <= 100:
        return [Block("heading", lines[0], _LEVELS[drawn[1][0]]), *_part("\n".join(lines[2:]))]
    lines = [line for line in lines if not re.fullmatch(r"\s*[=\-~_*#]{3,}\s*", line)]  # rules that are drawn
    width = max(map(len, lines), default=0)
    blocks: list[Block] = []
    for number, line in enumerate(lines):
        item = _ITEM.match(line)
        if item:
            depth = 1 + min(len(item[1].expandtabs(4)) // 2, 5)
            blocks.append(Block("item", line[item.end() :], depth))
        elif not blocks:
            blocks.append(Block("paragraph", line))
        else:
            # Wrapped lines are about as long as each other; a short one was ended on purpose.
            sign = " " if len(lines[number - 1]) > _FAR_SHORTER * width else "\n"
            blocks[-1] = Block(blocks[-1].kind, blocks[-1].text + sign + line, blocks[-1].level)
    return blocks
