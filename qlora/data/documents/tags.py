"""HTML inside of Markdown: its text in blocks, by the standard library alone.

A README opens with a centred `<h1>`, a table of pictures, a `<details>`. What is read here needs no package, so that
Markdown is the same text wherever it is read; whole pages are read by `html.py`.
"""

from __future__ import annotations

from html.parser import HTMLParser

from qlora.data.documents.blocks import Block, table, tidy

_UNSEEN = {"script", "style", "svg", "head", "template", "noscript"}
_BREAKS = {
    *("p", "div", "section", "article", "blockquote", "details", "summary", "center", "figure", "figcaption", "ul"),
    *("ol", "dl", "dt", "dd", "hr", "header", "footer", "main", "pre", "address", "aside", "nav", "form"),
}
_HEADINGS = {f"h{level}": level for level in range(1, 7)}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.parts: list[str] = []
        self.unseen = 0
        self.open: Block | None = None  # a heading or an item, without its text yet
        self.rows: list[list[str]] = []
        self.head = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _UNSEEN:
            self.unseen += 1
        elif tag == "br":
            self.parts.append("\n")
        elif tag in _HEADINGS or tag == "li":
            self.flush()
            self.open = Block("heading", level=_HEADINGS[tag]) if tag in _HEADINGS else Block("item", level=1)
        elif tag in ("table", "tr", "td", "th"):
            self.cell(tag)
        elif tag in _BREAKS and not self.rows:
            self.flush()

    def cell(self, tag: str) -> None:
        """The beginning of a table, a row or a cell."""
        if tag == "table":
            self.flush()
            self.head = False
        elif tag == "tr":
            self.end_cell()
            self.rows.append([])
        else:
            self.end_cell()
            self.head |= tag == "th" and len(self.rows) == 1
            if not self.rows:
                self.rows.append([])
            self.rows[-1].append("")

    def end_cell(self) -> None:
        """Put the text that was gathered into the cell that is open, or before the table."""
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += " ".join("".join(self.parts).split())
            self.parts.clear()
        elif not self.rows:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNSEEN:
            self.unseen = max(0, self.unseen - 1)
        elif tag == "table":
            self.end_table()
        elif tag in _HEADINGS or tag == "li" or (tag in _BREAKS and not self.rows):
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.parts.append(" ".join(data.split("\n")))

    def end_table(self) -> None:
        """The rows that were gathered, as a table; what is laid out in one column is no table."""
        if not self.rows:
            return
        self.end_cell()
        rows, self.rows = self.rows, []
        if max(map(len, rows)) > 1:
            self.blocks.append(table(rows, True if self.head else None))
        else:
            self.blocks += [Block("paragraph", cell) for row in rows for cell in row]

    def flush(self) -> None:
        """The text that was gathered, as the block that is open, else as a paragraph."""
        text = tidy("".join(self.parts))
        self.parts.clear()
        kind = self.open or Block("paragraph")
        self.open = None
        if text:
            self.blocks.append(Block(kind.kind, text, kind.level))


def blocks_of_tags(markup: str) -> list[Block]:
    """The blocks of a piece of HTML. What is not closed ends with the piece."""
    tags = _Tags()
    tags.feed(markup)
    tags.close()
    tags.end_table()
    tags.flush()
    return tags.blocks


def text_of_tags(markup: str) -> str:
    """What one inline tag means: a line break, or nothing."""
    return "\n" if markup[:3].lower() == "<br" else ""
