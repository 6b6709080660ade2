"""PDF by PDFium: the lines of each page with their places and fonts, from which `pdf_layout.py` makes blocks."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator
from typing import Any

from qlora.data.documents.blocks import one_line, plain
from qlora.data.documents.parsed import NotReadable, Parsed
from qlora.data.documents.pdf_layout import Line, blocks_of_lines, without_contents, without_repeats

MAX_PAGES = 5000  # of one file: at 574 tokens a page nearly three million tokens
MAX_OUTLINE = 20_000  # entries
REPEATS = "lines that repeat as page header, footer or page number"
CONTENTS = "lines of a table of contents"
_HYPHEN = "\ufffe"  # what PDFium gives in place of a hyphen at a line's end and of the line break
_BOLD = re.compile(rb"bold|black|heavy|semibold|demi", re.IGNORECASE)
_NAME_BYTES = 128


def parse(data: bytes) -> Parsed:
    """Blocks of a PDF. Raises NotReadable for one that is encrypted, broken, or pictures of pages only."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower() or "security" in str(error).lower():
            raise NotReadable("the PDF is encrypted", "save a copy without a password") from None
        raise NotReadable(f"not a readable PDF ({str(error)[:100]})", "make it anew from its source") from None
    pages = len(document)
    if not pages:
        raise NotReadable("a PDF without a page", "make it anew from its source")
    read: list[list[Line]] = []
    empty: list[int] = []
    broken: list[int] = []
    for number in range(min(pages, MAX_PAGES)):
        try:
            page = document[number]
            read.append(_lines(page, number))
            page.close()
        except pypdfium2.PdfiumError:
            read.append([])
            broken.append(number + 1)
            continue
        if not read[-1]:
            empty.append(number + 1)
    if not any(read):
        what = "page that can be read" if len(broken) == len(read) else "text on its pages (scanned pictures?)"
        counted = f"no {what}, {pages:,} page{'s' * (pages != 1)} in all"
        raise NotReadable(counted, "run text recognition (OCR) over it first, or leave it out")
    kept, repeats = without_repeats(read)
    kept, contents = without_contents(kept)
    told = (
        (REPEATS, repeats),
        (CONTENTS, contents),
        (f"pages without text (scanned?): {_ranges(empty)}", len(empty)),
        (f"pages that cannot be read: {_ranges(broken)}", len(broken)),
        (f"pages after the first {MAX_PAGES:,}", pages - MAX_PAGES),
    )
    blocks = blocks_of_lines(kept, _outline(document))
    return Parsed(blocks, min(pages, MAX_PAGES), tuple(item for item in told if item[1] > 0))


def _ranges(numbers: list[int]) -> str:
    """Page numbers as 3, 7–9; the first ten groups."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and groups[-1][1] == number - 1:
            groups[-1][1] = number
        else:
            groups.append([number, number])
    told = [str(first) if first == last else f"{first}–{last}" for first, last in groups[:10]]
    return ", ".join(told + ["…"] * (len(groups) > 10))


def _outline(document: Any) -> dict[str, int]:
    """Levels from 1 by the bookmarks' words in small letters."""
    import pypdfium2

    found: dict[str, int] = {}
    try:
        for number, entry in enumerate(document.get_toc(max_depth=6)):
            if number >= MAX_OUTLINE:
                break
            title = entry.get_title() if hasattr(entry, "get_title") else entry.title
            found.setdefault(one_line(plain(title)).lower(), entry.level + 1)
    except pypdfium2.PdfiumError:
        return {}
    return found


def _lines(page: Any, number: int) -> list[Line]:
    text_page = page.get_textpage()
    text = text_page.get_text_range()
    if len(text) != text_page.count_chars():  # letters beyond the first 65,536 are two units: one place each
        from pypdfium2 import raw

        units = [raw.FPDFText_GetUnicode(text_page, at) for at in range(text_page.count_chars())]
        text = "".join(chr(unit) if unit < 0x110000 else "\ufffd" for unit in units)
    turned = page.get_rotation()
    probe = _Probe(text_page, turned)
    found = []
    for start, end, hyphen in _spans(text):
        words = [
            (probe.box(start + word.start(), start + word.end() - 1), word[0])
            for word in re.finditer(r"\S+", text[start:end])
        ]
        if words:
            middle = start + (end - start) // 2
            size, bold = probe.font(middle if text[middle].strip() else start + len(text[start:end].rstrip()) - 1)
            found.append(Line.of(number, words, probe.baseline(start), size, bold, hyphen))
    text_page.close()
    return found


def _spans(text: str) -> Iterator[tuple[int, int, bool]]:
    """(first character, one after the last, whether a hyphen was at its end) of each line, without blanks in front."""
    for line in re.finditer(rf"[^\r\n{_HYPHEN}]+{_HYPHEN}?", text):
        hyphen = line[0].endswith(_HYPHEN)
        start = line.start() + len(line[0]) - len(line[0].lstrip())
        end = line.end() - hyphen
        if start < end:
            yield start, end, hyphen


class _Probe:
    """Asks PDFium for places and fonts of characters, as they are on a page that is turned upright."""

    def __init__(self, text_page: Any, turned: int) -> None:
        from pypdfium2 import raw

        self.raw, self.page, self.turned = raw, text_page, turned
        self.values = [ctypes.c_double() for _ in range(4)]
        self.references = [ctypes.byref(value) for value in self.values]

    def upright(self, x: float, y: float) -> tuple[float, float]:
        return {90: (y, -x), 180: (-x, -y), 270: (-y, x)}.get(self.turned, (x, y))

    def box(self, first: int, last: int) -> tuple[float, float]:
        """Left and right end of a word."""
        ends = []
        for at in (first, last):
            self.raw.FPDFText_GetCharBox(self.page, at, *self.references)
            left, right, bottom, top = (value.value for value in self.values)
            ends += [self.upright(left, bottom)[0], self.upright(right, top)[0]]
        return min(ends), max(ends)

    def baseline(self, at: int) -> float:
        self.raw.FPDFText_GetCharOrigin(self.page, at, *self.references[:2])
        return self.upright(self.values[0].value, self.values[1].value)[1]

    def font(self, at: int) -> tuple[float, bool]:
        """Size in points as it is shown, and whether it is bold."""
        size = self.raw.FPDFText_GetFontSize(self.page, at)
        matrix = self.raw.FS_MATRIX()
        if self.raw.FPDFText_GetMatrix(self.page, at, ctypes.byref(matrix)):
            size *= math.hypot(matrix.c, matrix.d) or 1
        name, flags = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_int()
        length = self.raw.FPDFText_GetFontInfo(self.page, at, name, _NAME_BYTES, ctypes.byref(flags))
        bold = bool(length and length <= _NAME_BYTES and _BOLD.search(name.value))
        return (size if math.isfinite(size) else 0.0), bold or self.raw.FPDFText_GetFontWeight(self.page, at) >= 600
