"""Documents to passages: sections by headings, then blocks, then sentences, of a bounded number of tokens.

A passage never goes over a heading, so that its path says what it is about. Where a section is too long for one, it is
parted where its own words say so (at the border, of those far enough on, whose sentences have the smallest hash), and
not at each so many tokens: after a sentence that was changed the borders are the old ones again, and so are the keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from qlora.data.documents.blocks import Block
from qlora.data.documents.document import Document
from qlora.data.documents.sentences import sentences_of

LIMIT = 400  # tokens of a passage, the path of its headings included
PATH_SIGN = " › "
_LONG_HEADING = 10  # a heading of more than the limit / 10 is a paragraph: six of them leave room for text
_SPARE = 4  # tokens that joining parts may add
_LETTERS = 4  # of a token of plain English, about: where the search for a word's part begins
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Passage:
    """What is shown and asked about at once.

    `document` is the shown path of the file that it stands in. `headings` is the path to its section, outermost first.
    `sentences` are the units that are asked about: sentences, list items, table rows (each with the header's words in
    it: `Code: E41 | Meaning: no water`), lines of code. `text` is what a model reads: the path of headings, an empty
    line, then the section's own text. `about` and `language` are the document's.
    """

    document: str
    headings: tuple[str, ...]
    sentences: tuple[str, ...]
    text: str
    about: str
    language: str

    @cached_property
    def key(self) -> str:
        """Hex sha256 of what it says, wherever it stands: a passage that moves to another file keeps its key."""
        said = [self.text, self.sentences, self.about, self.language]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class _Unit:
    """A part of a section that is not parted any further: its text, what is asked about, and what joins it to before.

    `header` is the table's first line, which is repeated where a passage begins within the table.
    """

    text: str
    asked: str
    glue: str
    header: str = ""


def passages(document: Document, count_tokens: CountTokens, limit: int = LIMIT) -> list[Passage]:
    """The document's passages in order, each of at most `limit` tokens; every word of it stands in one of them.

    `count_tokens` gives a text's number of tokens without any that a template adds.
    """
    found = []
    for headings, blocks in _sections(document.blocks, lambda text: count_tokens(text) > limit // _LONG_HEADING):
        path = PATH_SIGN.join(headings)
        packing = _Packing(path, count_tokens, limit)
        units = [unit for number, block in enumerate(blocks) for unit in _units(block, document.language, number)]
        for text, sentences in packing.packed([part for unit in units for part in packing.fitting(unit)]):
            found.append(Passage(document.path, headings, tuple(sentences), text, document.about, document.language))
    return found


def unique_passages(
    documents: Iterable[Document], count_tokens: CountTokens, limit: int = LIMIT
) -> tuple[list[Passage], int]:
    """The passages of all documents, each text once, and how many were left out because one before says the same."""
    found: dict[str, Passage] = {}
    twice = 0
    for document in documents:
        for passage in passages(document, count_tokens, limit):
            twice += passage.key in found
            found.setdefault(passage.key, passage)
    return list(found.values()), twice


def _sections(blocks: Sequence[Block], too_long: Callable[[str], bool]) -> list[tuple[tuple[str, ...], list[Block]]]:
    """(path of headings, blocks below it). A heading below which nothing stands is text of the section around it."""
    found: list[tuple[tuple[str, ...], list[Block]]] = []
    path: list[tuple[int, str]] = []
    is_bare = False  # whether nothing stands below the path's last heading yet

    def add(block: Block, goes_on: bool) -> None:
        headings = tuple(text for _, text in path)
        if not (goes_on and found and found[-1][0] == headings):
            found.append((headings, []))
        found[-1][1].append(block)

    new_section = True
    for block in (*blocks, Block("heading", level=0)):  # the last closes all
        if block.kind != "heading" or (block.text and too_long(block.text)):
            add(Block("paragraph", block.text) if block.kind == "heading" else block, goes_on=not new_section)
            is_bare = new_section = False
            continue
        if is_bare and path[-1][0] >= block.level:
            text = path.pop()[1]
            add(Block("paragraph", text), goes_on=True)
        while path and path[-1][0] >= block.level:
            path.pop()
        path.append((block.level, block.text))
        is_bare = new_section = True
    return found


def _units(block: Block, language: str, number: int) -> Iterator[_Unit]:
    """A block's units; the first is joined to what stands before by an empty line."""
    glue = "\n\n" if number else ""
    if block.kind == "table":
        yield from _rows(block, glue)
    elif block.kind == "item":
        yield _Unit(block.lines(), block.text.replace("\n", " "), "\n" if number else "")
    elif block.kind == "code":
        for line in block.text.split("\n"):
            if line.strip():
                yield _Unit(line, line.strip(), glue)
                glue = "\n"
    else:
        for line in block.text.split("\n"):
            for sentence in sentences_of(line, language):
                yield _Unit(sentence, sentence, glue)
                glue = " "
            glue = "\n"


def _rows(block: Block, glue: str) -> Iterator[_Unit]:
    head, *rows = block.rows
    header = " | ".join(head)
    if not rows:
        yield _Unit(header, header, glue)
    for row in rows:
        text = " | ".join(row)
        names = head or ("",) * len(row)
        named = [f"{name}: {cell}" if name else cell for name, cell in zip(names, row, strict=True) if cell]
        yield _Unit(text, " | ".join(named), glue, header)
        glue = "\n"


def _most(total: int, near: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `total` that fits, sought from `near` on: what lies far beyond is never counted, so that
    a text without an end takes time by its length and not by its square."""
    low, high = 0, min(total, near)
    while high < total and fits(high):
        low, high = high, min(total, 2 * high)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


class _Packing:
    """Units of one section to texts within the limit."""

    def __init__(self, path: str, count_tokens: CountTokens, limit: int) -> None:
        self.path, self.count, self.limit = path, count_tokens, limit
        self.room = max(1, limit - (count_tokens(path) + _SPARE if path else 0))

    def fitting(self, unit: _Unit) -> list[_Unit]:
        """The unit, or its pieces where it does not fit alone: parted at words, and a word only where it must be.

        A table's header that takes more than half of the room is a row of its own, and not repeated.
        """
        if unit.header and 2 * self.count(unit.header) > self.room:
            rows = [_Unit(unit.header, unit.header, unit.glue)] if unit.glue != "\n" else []
            return [part for row in (*rows, _Unit(unit.text, unit.asked, "\n")) for part in self.fitting(row)]
        if self.count(self.text([unit])) <= self.limit:
            return [unit]
        pieces = self.pieces(unit.text, unit.header)
        return [
            _Unit(piece, piece, (unit.glue if not number else " "), unit.header) for number, piece in enumerate(pieces)
        ]

    def pieces(self, text: str, header: str) -> list[str]:
        atoms = re.findall(r"\S+", text)
        found: list[str] = []
        start = 0
        while start < len(atoms):
            if many := self.run(atoms, start, header):
                found.append(" ".join(atoms[start : start + many]))
                start += many
            elif len(atoms[start]) > 1:
                *whole, atoms[start] = self.parted(atoms[start], header)
                found += whole
            else:
                found.append(atoms[start])
                start += 1
        return found

    def run(self, atoms: Sequence[str], start: int, header: str) -> int:
        """How many words from `start` on fit: mostly no more than the limit's tokens."""
        left = len(atoms) - start
        return _most(left, self.limit, lambda many: self.fits(" ".join(atoms[start : start + many]), header))

    def parted(self, word: str, header: str) -> list[str]:
        """A word that does not fit (a line of Chinese, a key in base64), parted behind a comma where there is one."""
        parts: list[str] = []
        start = 0
        while True:
            end = start + self.letters(word, start, header)
            if end == len(word):
                return [*parts, word[start:]]
            comma = max(word.rfind(sign, (start + end) // 2, end) for sign in "，、；,;")
            end = comma + 1 if comma > start else end
            parts.append(word[start:end])
            start = end

    def letters(self, word: str, start: int, header: str) -> int:
        """How many letters from `start` on fit, at least one."""
        most = _most(
            len(word) - start, _LETTERS * self.limit, lambda many: self.fits(word[start : start + many], header)
        )
        return max(1, most)

    def fits(self, text: str, header: str) -> bool:
        return self.count(self.text([_Unit(text, text, "", header)])) <= self.limit

    def packed(self, units: Sequence[_Unit]) -> Iterator[tuple[str, list[str]]]:
        """(text, sentences) of each passage."""
        sizes = [self.count(unit.text) + 1 for unit in units]
        headers = {header: self.count(header) + 1 for header in {unit.header for unit in units} if header}
        start = 0
        while start < len(units):
            end, taken, header = start, 0, ""
            while end < len(units):
                repeated = headers.get(units[end].header, 0) if units[end].header != header else 0
                if end > start and taken + sizes[end] + repeated > self.room:
                    break
                taken, header, end = taken + sizes[end] + repeated, units[end].header, end + 1
            if end < len(units):
                end = self.border(units, sizes, start, end)
            while end > start + 1 and self.count(self.text(units[start:end])) > self.limit:
                end -= 1
            part = units[start:end]
            yield self.text(part), [unit.asked for unit in part]
            start = end

    def border(self, units: Sequence[_Unit], sizes: Sequence[int], start: int, end: int) -> int:
        """Where to part, at or before `end` and not in the first half: between blocks rather than within one."""
        taken = 0
        places: list[int] = []
        for place in range(start + 1, end + 1):
            taken += sizes[place - 1]
            if 2 * taken >= self.room:
                places.append(place)
        between = [place for place in places if units[place].glue == "\n\n"]
        return min(
            between or places or [end], key=lambda place: _hash(units[place - 1].text + "\0" + units[place].text)
        )

    def text(self, units: Sequence[_Unit]) -> str:
        """The path, an empty line, and the units as they stand in the section."""
        parts = [self.path + "\n\n"] if self.path else []
        header = ""
        for number, unit in enumerate(units):
            if number:
                parts.append(unit.glue)
            if unit.header and unit.header != header:
                parts.append(unit.header + "\n")
            header = unit.header
            parts.append(unit.text)
        return "".join(parts)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
