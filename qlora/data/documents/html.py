"""HTML by beautifulsoup4: one walk, which also reads what DOCX and EPUB become.

Out go scripts, styles, forms' controls, what is hidden, navigation, and headers, footers and asides of the page; those
of an `article` or of `main` belong to the text. How many words that were is told.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora.data.documents.blocks import Block, one_line, table, tidy
from qlora.data.documents.decoding import decoded
from qlora.data.documents.parsed import Parsed

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

BOILERPLATE = "words of navigation, page header, footer and aside"
_UNSEEN = {
    *("script", "style", "noscript", "template", "svg", "math", "iframe", "object", "embed", "canvas", "audio"),
    *("video", "map", "button", "select", "textarea", "input", "datalist", "head", "title", "img", "picture"),
}
_FURNITURE = {"header", "footer", "aside"}
_ROLES = {"navigation", "banner", "contentinfo", "complementary", "search"}
_BLOCKS = {
    *("html", "body", "p", "div", "section", "article", "main", "blockquote", "details", "summary", "figure"),
    *("figcaption", "ul", "ol", "menu", "dl", "dt", "dd", "li", "hr", "header", "footer", "aside", "address", "form"),
    *("fieldset", "legend", "center", "caption", "table", "thead", "tbody", "tfoot", "tr", "td", "th", "hgroup", "nav"),
    *("pre", "dialog", "h1", "h2", "h3", "h4", "h5", "h6"),
}
_CELLS, _ROW, _PARTS = ("td", "th"), ("tr",), ("thead", "tbody", "tfoot")
# By name of a tag: what open elements its beginning ends, as far as the element around them.
_ENDED_BY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(_CELLS, (_CELLS, ("tr", "table"))),
    "tr": ((*_CELLS, *_ROW), (*_PARTS, "table")),
    **dict.fromkeys(_PARTS, ((*_CELLS, *_ROW, *_PARTS), ("table",))),
    "li": (("li",), ("ul", "ol", "menu")),
    **dict.fromkeys(("dt", "dd"), (("dt", "dd"), ("dl",))),
}
_HEADING = re.compile(r"h[1-6]")
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_MAX_DEPTH = 120  # of elements that are walked; what stands deeper is taken as one text
_MAX_SPAN = 1000  # rows or columns of one cell, as HTML bounds them (65,534 rows, 1,000 columns)
_SUPERSCRIPTS = str.maketrans("0123456789+-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻")
_FOOTNOTE = re.compile(r"\[?\(?[\d*†‡]{1,4}\)?\]?")


def parse(data: bytes) -> Parsed:
    """Blocks of an HTML page; its title heads it where it has no heading of the first level."""
    text, told = decoded(data, is_html=True)
    tree = soup(text)
    blocks, words = walked(tree)
    title = one_line(tree.title.get_text()) if tree.title else ""
    if title and blocks and not any(block.kind == "heading" and block.level == 1 for block in blocks):
        blocks.insert(0, Block("heading", title, 1))
    return Parsed(blocks, left_out=told + (((BOILERPLATE, words),) if words else ()))


def soup(markup: str) -> BeautifulSoup:
    """The tree of a page; XML is read as HTML on purpose, since no entity that it declares is expanded then."""
    import bs4

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs4.XMLParsedAsHTMLWarning)
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        tree = bs4.BeautifulSoup(markup, "html.parser")
    _close_what_is_open(tree)
    return tree


def _close_what_is_open(tree: BeautifulSoup) -> None:
    """Put beside each other what HTML parts without an end tag (13.1.2.4): this parser leaves it in each other."""
    for tag in tree.find_all([*_ENDED_BY]):
        closed, around = _ENDED_BY[tag.name]
        while (outer := tag.find_parent([*closed, *around])) is not None and outer.name in closed:
            outer.insert_after(*[part.extract() for part in [tag, *tag.next_siblings]])


def walked(tree: BeautifulSoup) -> tuple[list[Block], int]:
    """Blocks of a page or of a piece of one, and how many words of boilerplate were left out."""
    walk = _Walk(lonely_heading=_lonely_heading(tree))
    walk.element(tree, 0)
    walk.flush()
    return walk.blocks, walk.boilerplate


def _lonely_heading(soup: Tag) -> Tag | None:
    """The page's only h1: it is the page's name also where it stands in its header."""
    found = soup.find_all("h1", limit=2)
    return found[0] if len(found) == 1 else None


class _Walk:
    def __init__(self, lonely_heading: Tag | None) -> None:
        self.lonely_heading = lonely_heading
        self.blocks: list[Block] = []
        self.parts: list[str] = []
        self.boilerplate = 0
        self.inside = 0  # how many `main` and `article` are open
        self.lists: list[int | None] = []
        self.marker: str | None = None  # of the item that is open and has no text yet

    def flush(self) -> None:
        """What was gathered, as an item or paragraphs: two line breaks in a row part them."""
        text = "".join(self.parts)
        self.parts.clear()
        for part in re.split(r"\n\s*\n", text):
            if not (told := tidy(part)):
                continue
            if self.marker is not None:
                self.blocks.append(Block("item", self.marker + told, max(1, len(self.lists))))
                self.marker = None
            else:
                self.blocks.append(Block("paragraph", told))

    def element(self, tag: Tag, depth: int) -> None:
        """What stands in an element, in order."""
        import bs4

        for child in tag.children:
            if isinstance(child, bs4.Tag):
                if depth < _MAX_DEPTH:
                    self.tag(child, depth + 1)
                else:
                    self.parts.append(f" {one_line(' '.join(_seen_text(child)))} ")
            elif type(child) is bs4.element.NavigableString:
                self.parts.append(_blanks(child))

    def tag(self, tag: Tag, depth: int) -> None:
        name = tag.name.rpartition(":")[2]
        if name in _UNSEEN or _is_hidden(tag):
            return
        if self.is_boilerplate(tag, name):
            self.leave_out(tag)
        elif name == "br":
            self.parts.append("\n")
        elif _HEADING.fullmatch(name):
            self.flush()
            self.heading(tag, int(name[1]))
        elif name == "pre":
            self.flush()
            self.blocks.append(Block("code", _code(tag)))
        elif name == "table":
            self.flush()
            self.table(tag, depth)
        elif name in ("ul", "ol", "menu"):
            self.list(tag, name, depth)
        elif name == "li":
            self.item(tag, depth)
        elif name == "dl":
            self.flush()
            self.definitions(tag, depth)
        elif name == "sup":
            self.parts.append(_raised(tag))
        else:
            self.plain(tag, name, depth)

    def plain(self, tag: Tag, name: str, depth: int) -> None:
        """An element that means nothing but a border or none."""
        borders = name in _BLOCKS
        if borders:
            self.flush()
        self.inside += name in ("main", "article")
        self.element(tag, depth)
        self.inside -= name in ("main", "article")
        if borders:
            self.flush()

    def is_boilerplate(self, tag: Tag, name: str) -> bool:
        if name == "nav" or _attribute(tag, "role") in _ROLES:
            return True
        return name in _FURNITURE and not self.inside

    def leave_out(self, tag: Tag) -> None:
        self.flush()
        heading = self.lonely_heading
        if heading is not None and any(parent is tag for parent in heading.parents):
            self.heading(heading, 1)
            self.boilerplate -= len(heading.get_text(" ").split())
        self.boilerplate += sum(len(text.split()) for text in _seen_text(tag))

    def heading(self, tag: Tag, level: int) -> None:
        text = one_line("".join(_inline_text(tag)))
        # What documentation tools put behind a heading, to be linked to.
        self.blocks.append(Block("heading", text.rstrip("¶#🔗\uf0c1 ").rstrip() or text, level))

    def list(self, tag: Tag, name: str, depth: int) -> None:
        self.flush()
        self.marker = None if not self.lists else self.marker
        start = _attribute(tag, "start")
        self.lists.append((int(start) if re.fullmatch(r"\d{1,9}", start) else 1) if name == "ol" else None)
        self.element(tag, depth)
        self.flush()
        self.lists.pop()

    def item(self, tag: Tag, depth: int) -> None:
        self.flush()
        number = self.lists[-1] if self.lists else None
        if number is not None:
            value = _attribute(tag, "value")
            number = int(value) if re.fullmatch(r"\d{1,9}", value) else number
            self.lists[-1] = number + 1
        self.marker = "" if number is None else f"{number}. "
        self.element(tag, depth)
        self.flush()
        self.marker = None

    def definitions(self, tag: Tag, depth: int) -> None:
        """A term and what it means are one item, where the meaning is one text."""
        import bs4

        terms: list[str] = []
        for child in tag.find_all(["dt", "dd"]):
            if child.find_parent("dl") is not tag or _is_hidden(child):
                continue
            text = one_line("".join(_inline_text(child)))
            if child.name == "dt":
                terms.append(text)
                continue
            whole = not any(isinstance(inner, bs4.Tag) and inner.name in _BLOCKS - {"p"} for inner in child.descendants)
            if terms:
                self.blocks.append(Block("item", f"{', '.join(terms)}: {text}" if whole else ", ".join(terms), 1))
            elif whole:
                self.blocks.append(Block("item", text, 1))
            if not whole:
                self.element(child, depth + 1)
                self.flush()
            terms = []
        if terms:
            self.blocks.append(Block("item", ", ".join(terms), 1))

    def table(self, tag: Tag, depth: int) -> None:
        """A table of facts as rows; one that only lays out a page (tables or headings in cells, one column) as text."""
        rows = [row for row in tag.find_all("tr") if row.find_parent("table") is tag]
        cells = [[cell for cell in row.find_all(["td", "th"]) if cell.find_parent("tr") is row] for row in rows]
        caption = tag.find("caption")
        if tag.find(["table", "h1", "h2", "h3", "h4"]) or max(map(len, cells), default=0) < 2:
            for child in ((caption,) if caption else ()), *cells:
                for cell in child:
                    self.plain(cell, "td", depth + 1)
            if not cells:
                self.element(tag, depth)
                self.flush()
            return
        if caption:
            self.plain(caption, "caption", depth + 1)
        shown = [(row, line) for row, line in zip(rows, cells, strict=True) if line and not _is_hidden(row)]
        told = [cell.name == "th" for _, line in shown for cell in line]
        first = shown[0] if shown else None
        in_head = first is not None and (
            first[0].find_parent("thead") is not None or all(cell.name == "th" for cell in first[1])
        )
        self.blocks.append(table(_spread([line for _, line in shown]), in_head or (False if any(told) else None)))


def _spread(rows: list[list[Any]]) -> list[list[str]]:
    """Cells' texts, each in every row that it spans, and once in the columns."""
    spread: list[list[str]] = []
    held: dict[int, tuple[int, str]] = {}  # column: rows that its cell still spans, and the text
    for cells in rows:
        line: list[str] = []
        for cell in cells:
            while (found := held.get(len(line))) and found[0] > 0:
                held[len(line)] = (found[0] - 1, found[1])
                line.append(found[1])
            text = one_line("".join(_inline_text(cell)))
            for column in range(_span(cell, "colspan")):
                held[len(line)] = (_span(cell, "rowspan") - 1, text if column == 0 else "")
                line.append(text if column == 0 else "")
        while (found := held.get(len(line))) and found[0] > 0:
            held[len(line)] = (found[0] - 1, found[1])
            line.append(found[1])
        spread.append(line)
    return spread


def _span(cell: Tag, name: str) -> int:
    value = _attribute(cell, name)
    return max(1, min(int(value), _MAX_SPAN)) if re.fullmatch(r"\d{1,6}", value) else 1


def _attribute(tag: Tag, name: str) -> str:
    value = tag.get(name) or ""
    return (value if isinstance(value, str) else " ".join(value)).strip().lower()


def _is_hidden(tag: Tag) -> bool:
    hidden = tag.get("hidden")
    return (hidden is not None and hidden != "until-found") or bool(_HIDDEN.search(_attribute(tag, "style")))


def _seen_text(tag: Tag) -> Iterator[str]:
    """The texts in an element, without what is never seen; not by recursion, which a deep page would end."""
    import bs4

    ahead: list[Any] = [iter(tag.children)]
    while ahead:
        child = next(ahead[-1], None)
        if child is None:
            ahead.pop()
        elif isinstance(child, bs4.Tag):
            if child.name == "br":
                yield "\n"
            elif child.name not in _UNSEEN and not _is_hidden(child):
                ahead.append(iter(child.children))
        elif type(child) is bs4.element.NavigableString:
            yield _blanks(child)


def _inline_text(tag: Tag, depth: int = 0) -> Iterator[str]:
    """The texts in an element that is one line; what is a block in it is set off by blanks."""
    import bs4

    for child in tag.children:
        if isinstance(child, bs4.Tag):
            if child.name == "sup":
                yield _raised(child)
            elif child.name in _UNSEEN or _is_hidden(child):
                continue
            elif child.name == "br" or depth > _MAX_DEPTH:
                yield " " if child.name == "br" else " ".join(_seen_text(child))
            else:
                border = " " if child.name in _BLOCKS else ""
                yield border
                yield from _inline_text(child, depth + 1)
                yield border
        elif type(child) is bs4.element.NavigableString:
            yield _blanks(child)


def _blanks(text: str) -> str:
    return re.sub(r"\s", " ", text)


def _raised(tag: Tag) -> str:
    """A superscript: a number as raised digits (m², 10⁻³), a mark that links to a footnote as nothing."""
    text = one_line("".join(_seen_text(tag)))
    if _FOOTNOTE.fullmatch(text) and (tag.find("a") is not None or tag.find_parent("a") is not None):
        return ""
    return text.translate(_SUPERSCRIPTS) if re.fullmatch(r"[+-]?\d{1,4}", text) else text


def _code(tag: Tag) -> str:
    import bs4

    parts = []
    for child in tag.descendants:
        if isinstance(child, bs4.Tag):
            parts.append("\n" if child.name == "br" else "")
        elif type(child) is bs4.element.NavigableString:
            parts.append(str(child))
    return "".join(parts)
