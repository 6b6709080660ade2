"""Lines on pages to blocks: what repeats in the margins is cut, lines become paragraphs, columns become tables.

A PDF says where letters stand and nothing of what they are. What is guessed here, and from what: headings from size,
weight and the bookmarks; paragraphs from gaps, indents and short last lines; tables from gaps that stand one above the
other; hyphens at line ends from the words of the same document.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Literal

from qlora.data.documents.blocks import Block, one_line, table

REPEATING = 0.3  # a line in the margin of more than this share of pages is no text
MARGIN_LINES = 3  # from the top and from the bottom of a page that may be header or footer
SAME_PLACE = 4.0  # points between the places of one header on two pages
COLUMN_GAP = 1.0  # in font sizes: gaps between words of justified text stay under it
SAME_COLUMN = 3.0  # points
LARGER = 1.12  # times the size of most letters: a heading
_BULLET = re.compile(r"[•▪◦‣·●○■□–—*\uf0b7\uf0a7-]\s+(?=\S)")
_NUMBER = re.compile(r"\d{1,3}[.)]\s+\S|[a-z]\)\s+\S")
_ENDED = re.compile(r"[.!?:;…。！？：；]['\"”’»)\]]*$")
_PAGE_NUMBER = re.compile(
    r"(?:page|seite|página|pagina|p\.|s\.)\s*\d+(?:\s*(?:/|of|von|de|sur)\s*\d+)?|第\s*\d+\s*页.*", re.IGNORECASE
)
_CONTENTS = re.compile(r"(?:\s?[.…·]){5,}\s*(?:\d{1,5}|[ivxlc]{1,6})?$")
_AND = re.compile(r"(?:und|oder|bzw\.|and|or|et|ou|y|o)\b")  # "Ein-" goes on with "und Ausgang"
_WIDE = re.compile(r"[\u3000-\u9fff\uf900-\ufaff\uff00-\uffef]")  # letters that are written without blanks


@dataclass(frozen=True)
class Line:
    """A line of a page. Places in points, `y` upwards; `cells`: its parts between wide gaps, (left, right, words)."""

    page: int
    text: str
    x0: float
    x1: float
    y: float
    size: float
    bold: bool
    hyphen: bool
    cells: tuple[tuple[float, float, str], ...]

    @staticmethod
    def of(
        page: int, words: list[tuple[tuple[float, float], str]], y: float, size: float, bold: bool, hyphen: bool
    ) -> Line:
        """The line that these words make: ((left, right), word) in order."""
        cells: list[tuple[float, float, str]] = []
        for (left, right), word in words:
            if cells and left - cells[-1][1] < COLUMN_GAP * max(size, 4.0):
                cells[-1] = (cells[-1][0], max(right, cells[-1][1]), f"{cells[-1][2]} {word}")
            else:
                cells.append((left, right, word))
        text = " ".join(word for _, word in words)
        x0, x1 = min(cell[0] for cell in cells), max(cell[1] for cell in cells)
        return Line(page, text, x0, x1, y, round(size * 2) / 2, bold, hyphen, tuple(cells))


def without_repeats(pages: Sequence[Sequence[Line]]) -> tuple[list[Line], int]:
    """All lines but those that stand in the margins of many pages at one height, and how many were cut.

    A line with a number counts as repeated where the number goes with the page, or never changes. Where most pages are
    numbered, the outermost line with a page's number is cut too: the name of a chapter beside it changes. So is an
    outermost line that says in smaller letters what another says: the title above the only page.
    """
    seen: dict[str, list[Line]] = defaultdict(list)
    numbered: dict[int, list[Line]] = defaultdict(list)
    margins: set[int] = set()
    cut: set[int] = set()
    sizes = Counter(line.size for page in pages for line in page for _ in line.text)
    body = sizes.most_common(1)[0][0] if sizes else 0
    largest: dict[str, float] = defaultdict(float)
    for line in (line for page in pages for line in page):
        largest[line.text] = max(line.size, largest[line.text])
    for page in pages:
        heights = sorted({round(line.y, 1) for line in page})
        outer = {*heights[:MARGIN_LINES], *heights[-MARGIN_LINES:]}
        for line in page:
            if (height := round(line.y, 1)) not in outer:
                continue
            margins.add(id(line))
            seen[re.sub(r"\d+", "#", line.text)].append(line)
            if height in (heights[0], heights[-1]):
                if line.size < largest[line.text]:
                    cut.add(id(line))
                if line.size > body:
                    continue
                for number in {int(number) for number in re.findall(r"^\d{1,5}\b|\b\d{1,5}$", line.text)}:
                    numbered[number - line.page].append(line)
    for there in (group for lines in seen.values() for group in _by_height(lines)):
        if _is_often(there, 1, len(pages)) and _same_or_counting(there, counting=there[0].size <= body):
            cut.update(map(id, there))
    for lines in numbered.values():
        if _is_often(lines, 2, len(pages)):
            cut.update(map(id, lines))
    text = [line for page in pages for line in page]
    cut.update(id(line) for line in text if id(line) in margins and _PAGE_NUMBER.fullmatch(line.text))
    return [line for line in text if id(line) not in cut], len(cut)


def _by_height(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines in groups that stand at one height of their pages."""
    groups: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.y):
        if groups and line.y - groups[-1][-1].y <= SAME_PLACE:
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups


def without_contents(lines: Sequence[Line]) -> tuple[list[Line], int]:
    """All lines but those of a table of contents, whose dots lead to a page, and how many those were."""
    kept = [line for line in lines if not _CONTENTS.search(line.text)]
    return kept, len(lines) - len(kept)


def _is_often(lines: Sequence[Line], more_than: int, pages: int) -> bool:
    return len({line.page for line in lines}) > max(more_than, REPEATING * pages)


def _same_or_counting(lines: Sequence[Line], counting: bool) -> bool:
    """Whether the lines say the same, or with `counting` the same but for a number that goes up with the pages.

    Large letters are not asked for numbers: `Step 3` on the third page is a heading.
    """
    common, times = Counter(line.text for line in lines).most_common(1)[0]
    if times > 0.5 * len(lines):
        return True
    if not counting:
        return False
    numbers = [([int(number[-9:]) for number in re.findall(r"\d+", line.text)], line.page) for line in lines]
    for place in range(len(re.findall(r"\d+", common))):
        steps = Counter(found[place] - page for found, page in numbers)
        if steps.most_common(1)[0][1] > 0.5 * len(lines):
            return True
    return False


@dataclass
class _Group:
    """Lines that belong together."""

    lines: list[Line] = field(default_factory=list)
    is_item: bool = False


def blocks_of_lines(lines: Sequence[Line], outline: dict[str, int]) -> list[Block]:
    """Blocks in the order of the lines. `outline`: levels of headings by their words in small letters."""
    if not lines:
        return []
    sizes: Counter[tuple[float, bool]] = Counter()
    for line in lines:
        sizes[line.size, line.bold] += len(line.text)
    body, body_bold = sizes.most_common(1)[0][0]
    gaps: dict[float, list[float]] = defaultdict(list)
    for before, line in pairwise(lines):
        if before.page == line.page and before.size == line.size and 0 < before.y - line.y < 2.5 * max(line.size, 1):
            gaps[line.size].append(before.y - line.y)
    layout = _Layout(lines, body, body_bold, {size: median(found) for size, found in gaps.items()})
    return layout.blocks({title: level for title, level in outline.items() if title})


class _Layout:
    def __init__(self, lines: Sequence[Line], body: float, body_bold: bool, leading: dict[float, float]) -> None:
        self.lines, self.body, self.body_bold, self.leading = lines, body, body_bold, leading
        self.right: dict[int, float] = defaultdict(float)
        self.left: dict[int, float] = {}
        for line in lines:
            self.left[line.page] = min(line.x0, self.left.get(line.page, line.x0))
            if line.size == body:
                self.right[line.page] = max(self.right[line.page], line.x1)
        text = " ".join(line.text for line in lines).lower()
        self.words = Counter(re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", text))

    def blocks(self, outline: dict[str, int]) -> list[Block]:
        parts: list[_Group | Block] = []
        at = 0
        while at < len(self.lines):
            rows, end = self.table_at(at)
            if rows:
                parts.append(table(rows, has_header=self.head_of(at)))
                at = end
                continue
            line, group = self.lines[at], parts[-1] if parts else None
            if isinstance(group, _Group) and self.goes_on(group, line):
                group.lines.append(line)
            else:
                parts.append(_Group([line], bool(_BULLET.match(line.text) or _NUMBER.match(line.text))))
            at += 1
        kinds = {
            (part.lines[0].size, part.lines[0].bold)
            for part in parts
            if isinstance(part, _Group) and self.is_heading(part)
        }
        levels = {kind: number + 1 for number, kind in enumerate(sorted(kinds, reverse=True))}
        return [part if isinstance(part, Block) else self.block(part, levels, outline) for part in parts]

    def head_of(self, at: int) -> bool | None:
        """A first row in bold letters over others is a header; else its words decide."""
        follows = self.lines[at + 1] if at + 1 < len(self.lines) else None
        return True if follows is not None and self.lines[at].bold and not follows.bold else None

    def table_at(self, at: int) -> tuple[list[list[str]], int]:
        """The rows of a table that begins with this line, and the line after it; none where none begins.

        It goes on over the next page where the first line there fills the same columns.
        """
        first = self.lines[at]
        if len(first.cells) < 2:
            return [], at
        columns = [(left, right) for left, right, _ in first.cells]
        header = [text for _, _, text in first.cells]
        rows = [list(header)]
        end = at + 1
        while end < len(self.lines):
            line = self.lines[end]
            places = [_column(cell, columns) for cell in line.cells]
            known = [place for place in places if place is not None]
            if len(set(known)) < len(line.cells):  # beside the columns, or two in one
                break
            if [text for _, _, text in line.cells] == header and line.page != first.page:  # repeated on the next page
                end += 1
                continue
            kind = self.row_of(line, self.lines[end - 1], known, columns)
            if kind == "none":
                break
            if kind == "row":
                rows.append([""] * len(columns))
            for place, (left, right, text) in zip(known, line.cells, strict=True):
                rows[-1][place] = f"{rows[-1][place]} {text}".strip()
                columns[place] = (min(left, columns[place][0]), max(right, columns[place][1]))
            end += 1
        return (rows, end) if len(rows) > 1 else ([], at)

    def row_of(
        self, line: Line, above: Line, places: list[int], columns: list[tuple[float, float]]
    ) -> Literal["row", "wrapped", "none"]:
        """Whether a line below a table's begins a row, wraps cells of the row above, or is no part of it."""
        if line.page != above.page:
            return "row" if len(places) == len(columns) else "none"
        size = max(line.size, 1)
        gap = above.y - line.y
        if not 0 < gap <= 3.5 * size:
            return "none"
        if len(places) == len(columns):
            return "row"
        near = gap <= 1.4 * size
        if near and (0 not in places or (len(places) == 1 and line.x1 < columns[1][0] and len(above.cells) > 1)):
            return "wrapped"
        return "row" if len(places) > 1 and 0 in places else "none"

    def goes_on(self, group: _Group, line: Line) -> bool:
        """Whether a line continues the block that is open."""
        last, size = group.lines[-1], max(line.size, 1)
        if abs(line.y - last.y) < 0.3 * size and line.page == last.page and line.x0 >= last.x1 - 1:
            return True  # the same line, set in two fonts
        if abs(line.size - last.size) > 0.7 or line.bold != last.bold:
            return False
        if _BULLET.match(line.text) or (_NUMBER.match(line.text) and not last.hyphen):
            return False
        if last.hyphen:
            return True
        ended = bool(_ENDED.search(last.text))
        gap = last.y - line.y
        if line.page != last.page or gap <= 0:  # the next page or column
            return not ended and line.size == self.body and not self.is_heading(group)
        if gap > 1.25 * self.leading.get(line.size, 1.2 * size):
            return False
        width = self.right[line.page] - group.lines[0].x0
        if ended and last.x1 < self.right[line.page] - 0.15 * width:
            return False
        return not (ended and not group.is_item and line.x0 > last.x0 + 0.8 * size)

    def is_heading(self, group: _Group) -> bool:
        first, text = group.lines[0], " ".join(line.text for line in group.lines)
        if len(group.lines) > 3 or len(text) > 200 or not re.search(r"[^\W\d_]", text):
            return False
        if first.size >= LARGER * self.body:
            return not text.endswith((".", ",", ";")) or first.size >= 1.4 * self.body
        heavy = first.bold and not self.body_bold and all(line.bold for line in group.lines)
        return heavy and first.size >= 0.98 * self.body and len(text) <= 100 and not text.endswith((".", ",", ";", ":"))

    def block(self, group: _Group, levels: dict[tuple[float, bool], int], outline: dict[str, int]) -> Block:
        text = self.joined(group.lines)
        first = group.lines[0]
        level = outline.get(one_line(text).lower(), 0) if len(text) <= 200 else 0
        if level and (first.size > self.body or first.bold or self.is_heading(group)):
            return Block("heading", text, level)
        if self.is_heading(group):
            return Block("heading", text, levels[first.size, first.bold])
        bullet = _BULLET.match(text)
        if bullet or group.is_item:
            depth = 1 + max(0, min(5, round((first.x0 - self.left[first.page]) / 14) - 1))
            return Block("item", text[bullet.end() :] if bullet else text, depth)
        return Block("paragraph", text)

    def joined(self, lines: Sequence[Line]) -> str:
        """Lines as one text: hyphens that part a word at a line's end are taken out."""
        text, hyphen = lines[0].text, lines[0].hyphen
        for line in lines[1:]:
            if hyphen or re.search(r"[^\W\d_][-\u2010\u00ad]$", text):
                text = self.mended(text if not hyphen else text + "-", line.text)
            elif _WIDE.match(text[-1:]) and _WIDE.match(line.text):
                text += line.text
            else:
                text = f"{text} {line.text}"
            hyphen = line.hyphen
        return text + "-" * hyphen

    def mended(self, head: str, tail: str) -> str:
        """Two lines, of which the first ends in a hyphen: a parted word, or one that has the hyphen anyway."""
        before = re.findall(r"[^\W_]+(?:-[^\W_]+)*$", head[:-1])
        after = re.match(r"[^\W_]+", tail)
        if not before or after is None or head[-1] == "\u00ad":
            return head[:-1] + tail if head[-1] == "\u00ad" else head + tail
        if _AND.match(tail):
            return f"{head} {tail}"
        whole, parted = f"{before[0]}{after[0]}".lower(), f"{before[0]}-{after[0]}".lower()
        if not after[0][0].islower() or not before[0][-1].islower():
            return head + tail
        if self.words[parted] and not self.words[whole]:
            return head + tail
        return head[:-1] + tail


def _column(cell: tuple[float, float, str], columns: Sequence[tuple[float, float]]) -> int | None:
    """The column under which a cell stands: flush left, flush right or in the middle; None where under none or two."""
    left, right, _ = cell
    for number, (start, end) in enumerate(columns):
        flush = abs(left - start) <= SAME_COLUMN or abs(right - end) <= SAME_COLUMN
        centred = abs((left + right) - (start + end)) <= 2 * SAME_COLUMN
        if (flush or centred) and not any(
            left < other_end and right > other_start
            for other, (other_start, other_end) in enumerate(columns)
            if other != number
        ):
            return number
    return None
