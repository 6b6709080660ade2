"""One text written as Markdown, HTML, PDF, DOCX and EPUB, as such files are found in the world.

    python tools/write_documents.py handbook.md folder --formats md,html,pdf,docx,epub

The source is Markdown. The page has navigation, a footer and a script around the text; the PDF has a running header and
page numbers, wrapped lines and hyphens at line ends, in two of the fonts that every viewer has; the EPUB has a chapter
a file. The same text gives the same bytes, so that what is written may be committed.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from qlora.data.documents.blocks import Block
from qlora.data.documents.markdown import markdown_blocks

# Widths of the characters 32 to 126 in thousandths of the font's size: Adobe's metrics of Helvetica.
_WIDTHS = [
    *(278, 278, 355, 556, 556, 889, 667, 222, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556, 556, 556, 556),
    *(556, 556, 556, 556, 278, 278, 584, 584, 584, 556, 1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667),
    *(556, 833, 722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556, 222, 556),
    *(556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556, 556, 556, 333, 500, 278, 556, 500, 722),
    *(500, 500, 500, 334, 260, 334, 584),
]
_OTHER_WIDTH = 556  # of letters with accents, which are as wide as most small letters and digits
WIDTH, HEIGHT, MARGIN = 595, 842, 72  # A4, in points
_SIZES = {1: 20, 2: 15, 3: 13, 4: 12, 5: 12, 6: 12}
_BODY, _SMALL, _LEADING = 10.5, 8.5, 1.3
_DAY = (2024, 1, 1, 0, 0, 0)  # of every file in an archive
_NUMBERED = re.compile(r"(\d{1,4})\. ")


def write_markdown(blocks: Sequence[Block], title: str) -> bytes:
    """Markdown, with a table's line of dashes and fences around code."""
    parts = []
    for number, block in enumerate(blocks):
        if block.kind == "table":
            head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            head = head or [""] * len(rows[0])
            lines = [head, ["---"] * len(head), *rows]
            text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        else:
            text = f"```\n{block.text}\n```" if block.kind == "code" else block.lines().replace("\n", "\\\n")
        glued = number and block.kind == blocks[number - 1].kind == "item"
        parts.append(("" if not number else "\n" if glued else "\n\n") + text)
    return ("".join(parts) + "\n").encode()


def write_html(blocks: Sequence[Block], title: str) -> bytes:
    """A page of a site: the text in `main`, with what such pages have around it."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>body {{ font: 1rem sans-serif }}</style><script>var page = "<p>not shown</p>";</script></head>
<body><header><a href="/">Our company</a></header>
<nav><ul><li><a href="/">Home</a></li><li><a href="/contact">Contact</a></li></ul></nav>
<main>
{_body(blocks)}
</main>
<div hidden>Cookies?</div><footer>All rights reserved</footer></body></html>
""".encode()


def _body(blocks: Sequence[Block]) -> str:
    """Blocks as elements of HTML; valid as XHTML too."""
    out: list[str] = []
    open_lists: list[str] = []

    def close(to: int) -> None:
        while len(open_lists) > to:
            out.append(f"</li></{open_lists.pop()}>")

    for block in blocks:
        if block.kind != "item":
            close(0)
        text = escape(block.text, quote=False).replace("\n", "<br/>")
        if block.kind == "heading":
            out.append(f"<h{block.level}>{text}</h{block.level}>")
        elif block.kind == "paragraph":
            out.append(f"<p>{text}</p>")
        elif block.kind == "code":
            out.append(f"<pre><code>{escape(block.text, quote=False)}</code></pre>")
        elif block.kind == "table":
            head, *rows = block.rows
            top = f"<thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr></thead>" if head else ""
            lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
            out.append(f"<table>{top}<tbody>\n{lines}</tbody></table>")
        else:
            number = _NUMBERED.match(block.text)
            kind = "ol" if number else "ul"
            close(block.level)
            if len(open_lists) == block.level and open_lists[-1] != kind:
                close(block.level - 1)
            if len(open_lists) == block.level:
                out.append("</li>")
            while len(open_lists) < block.level:
                start = f' start="{number[1]}"' if number and number[1] != "1" else ""
                out.append(f"<{kind}{start}>")
                open_lists.append(kind)
                if len(open_lists) < block.level:
                    out.append("<li>")
            out.append(f"<li>{text[number.end() :] if number else text}")
    close(0)
    return "\n".join(out)


class _Pages:
    """Text set on pages: what each page shows, as operators of a PDF."""

    def __init__(self) -> None:
        self.pages: list[list[str]] = []
        self.y = 0.0
        self.new_page()

    def new_page(self) -> None:
        self.pages.append([])
        self.y = HEIGHT - MARGIN

    def show(self, x: float, y: float, text: str, size: float, bold: bool = False) -> None:
        try:
            data = text.encode("cp1252")
        except UnicodeEncodeError as error:
            raise SystemExit(f"the fonts that every viewer has know no {text[error.start]!r}") from None
        safe = re.sub(rb"([\\()])", rb"\\\1", data).decode("latin-1")
        self.pages[-1].append(f"BT /{'F2' if bold else 'F1'} {size} Tf 1 0 0 1 {x:.2f} {y:.2f} Tm ({safe}) Tj ET")

    def room(self, height: float) -> None:
        if self.y - height < MARGIN:
            self.new_page()

    def text(self, text: str, size: float, indent: float = 0, bold: bool = False) -> None:
        """A paragraph, wrapped, words hyphenated where a line would stay ragged."""
        for line in text.split("\n"):
            for part in wrapped(line, (WIDTH - 2 * MARGIN - indent) / size * (0.93 if bold else 1)):
                self.room(size * _LEADING)
                self.y -= size * _LEADING
                self.show(MARGIN + indent, self.y, part, size, bold)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        width = (WIDTH - 2 * MARGIN) / max(map(len, rows))
        for number, row in enumerate(row for row in rows if row):
            cells = [wrapped(cell, (width - 12) / _BODY, hyphens=False) for cell in row]
            high = max(map(len, cells))
            self.room(high * _BODY * _LEADING + 4)
            for line in range(high):
                self.y -= _BODY * _LEADING
                for column, cell in enumerate(cells):
                    if line < len(cell):
                        self.show(MARGIN + column * width, self.y, cell[line], _BODY, bold=not number and bool(rows[0]))
            self.y -= 4


def text_width(text: str) -> float:
    """Width of a text in units of the font's size."""
    return sum(_WIDTHS[ord(c) - 32] if 32 <= ord(c) < 127 else _OTHER_WIDTH for c in text) / 1000


def wrapped(text: str, width: float, hyphens: bool = True) -> list[str]:
    """The text in lines of at most `width` (in units of the font's size), long words parted with a hyphen."""
    lines = [""]
    for word in text.split():
        while word:
            line = f"{lines[-1]} {word}" if lines[-1] else word
            if text_width(line) <= width:
                lines[-1] = line
                break
            head = _head_of(word, width - text_width(lines[-1] + " -")) if hyphens else ""
            if head:
                lines[-1] = f"{lines[-1]} {head}-".strip()
                word = word[len(head) :]
            elif not lines[-1]:  # a word that no line takes
                lines[-1] = word
                break
            lines.append("")
    return [line for line in lines if line]


def _head_of(word: str, width: float) -> str:
    """The first letters of a long plain word that fit, up to a vowel before a consonant; "" where there are none."""
    if len(word) < 8 or not word[1:].strip(".,;:").islower() or not word.strip(".,;:").isalpha():
        return ""
    for end in range(len(word) - 4, 2, -1):
        if word[end - 1] in "aeiouäöü" and word[end] not in "aeiouäöü" and text_width(word[:end]) <= width:
            return word[:end]
    return ""


def write_pdf(blocks: Sequence[Block], title: str) -> bytes:
    """Pages with a running header and `Page 3 of 7` at the foot."""
    pages = _Pages()
    for number, block in enumerate(blocks):
        if block.kind == "heading":
            size = _SIZES[block.level]
            pages.y -= size * 0.8
            pages.room(size * 4)
            pages.text(block.text, size, bold=True)
            pages.y -= 4
        elif block.kind == "item":
            numbered = bool(_NUMBERED.match(block.text))
            pages.text(block.text if numbered else f"• {block.text}", _BODY, indent=14 * block.level)
            pages.y -= 2 if number + 1 < len(blocks) and blocks[number + 1].kind == "item" else 7
        elif block.kind == "table":
            pages.table(block.rows)
            pages.y -= 8
        else:
            pages.text(block.text, _BODY)
            pages.y -= 7
    for number, shown in enumerate(pages.pages, 1):
        last, pages.pages[-1] = pages.pages[-1], shown
        pages.show(MARGIN, HEIGHT - 40, title, _SMALL)
        foot = f"Page {number} of {len(pages.pages)}"
        pages.show(WIDTH - MARGIN - text_width(foot) * _SMALL, 36, foot, _SMALL)
        pages.pages[-1] = last
    return _pdf_file(["\n".join(shown) for shown in pages.pages])


def _pdf_file(contents: Sequence[str]) -> bytes:
    """Objects, their places and the trailer (ISO 32000-1, 7.5)."""
    kids = " ".join(f"{5 + 2 * number} 0 R" for number in range(len(contents)))
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /{} /Encoding /WinAnsiEncoding >>"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} >>",
        font.format("Helvetica"),
        font.format("Helvetica-Bold"),
    ]
    for number, content in enumerate(contents):
        fonts = "/Resources << /Font << /F1 3 0 R /F2 4 0 R >> >>"
        box = f"/MediaBox [0 0 {WIDTH} {HEIGHT}]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {box} {fonts} /Contents {6 + 2 * number} 0 R >>")
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    out = bytearray(b"%PDF-1.4\n")
    places = []
    for number, item in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{item}\nendobj\n".encode("latin-1")
    start = len(out)
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode()
    out += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()
    return bytes(out)


def archive(members: Sequence[tuple[str, str]]) -> bytes:
    """A zip of texts; the first, where it is called mimetype, is not compressed (EPUB 3.3, 4.2.2)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, text in members:
            info = zipfile.ZipInfo(name, _DAY)
            info.external_attr = 0o644 << 16
            kind = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            file.writestr(info, text.encode(), compress_type=kind)
    return out.getvalue()


_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"


def write_docx(blocks: Sequence[Block], title: str) -> bytes:
    """A document of Word's: headings by their styles, lists by numbering, tables with a header row."""
    body: list[str] = []
    lists = 0  # numbered lists begun: each is a numbering of its own
    for number, block in enumerate(blocks):
        if block.kind == "heading":
            body.append(_paragraph(block.text, f'<w:pStyle w:val="Heading{block.level}"/>'))
        elif block.kind == "item":
            numbered = _NUMBERED.match(block.text)
            goes_on = number and blocks[number - 1].kind == "item" and _NUMBERED.match(blocks[number - 1].text)
            lists += bool(numbered and not goes_on)
            place = f'<w:ilvl w:val="{block.level - 1}"/><w:numId w:val="{1 + lists if numbered else 1}"/>'
            text = block.text[numbered.end() :] if numbered else block.text
            body.append(_paragraph(text, f"<w:numPr>{place}</w:numPr>"))
        elif block.kind == "table":
            body.append(_word_table(block.rows))
        else:
            body.append(_paragraph(block.text, '<w:pStyle w:val="Code"/>' if block.kind == "code" else ""))
    headings = "".join(
        f'<w:style w:type="paragraph" w:styleId="Heading{level}"><w:name w:val="heading {level}"/></w:style>'
        for level in range(1, 7)
    )
    code = '<w:style w:type="paragraph" w:styleId="Code"><w:name w:val="Code"/></w:style>'
    kinds = "".join(
        f'<w:abstractNum w:abstractNumId="{number}">'
        + "".join(f'<w:lvl w:ilvl="{level}"><w:numFmt w:val="{kind}"/></w:lvl>' for level in range(6))
        + "</w:abstractNum>"
        for number, kind in enumerate(("bullet", "decimal"))
    )
    numbers = "".join(
        f'<w:num w:numId="{1 + number}"><w:abstractNumId w:val="{int(number > 0)}"/></w:num>'
        for number in range(lists + 1)
    )
    types = "application/vnd.openxmlformats-officedocument.wordprocessingml"
    parts = {"document": "document.main", "styles": "styles", "numbering": "numbering"}
    overrides = "".join(
        f'<Override PartName="/word/{name}.xml" ContentType="{types}.{kind}+xml"/>' for name, kind in parts.items()
    )
    relations = "application/vnd.openxmlformats-package.relationships+xml"
    default = f'<Default Extension="rels" ContentType="{relations}"/><Default Extension="xml" ContentType="text/xml"/>'
    inner = "".join(
        f'<Relationship Id="r{name}" Type="{_OFFICE}/{name}" Target="{name}.xml"/>' for name in ("styles", "numbering")
    )
    outer = f'<Relationship Id="r1" Type="{_OFFICE}/officeDocument" Target="word/document.xml"/>'
    return archive(
        [
            ("[Content_Types].xml", f'{_XML}<Types xmlns="{_PACKAGE}/content-types">{default}{overrides}</Types>'),
            ("_rels/.rels", f'{_XML}<Relationships xmlns="{_PACKAGE}/relationships">{outer}</Relationships>'),
            ("word/document.xml", f"{_XML}<w:document {_WORD}><w:body>{''.join(body)}</w:body></w:document>"),
            ("word/styles.xml", f"{_XML}<w:styles {_WORD}>{headings}{code}</w:styles>"),
            ("word/numbering.xml", f"{_XML}<w:numbering {_WORD}>{kinds}{numbers}</w:numbering>"),
            (
                "word/_rels/document.xml.rels",
                f'{_XML}<Relationships xmlns="{_PACKAGE}/relationships">{inner}</Relationships>',
            ),
        ]
    )


def _paragraph(text: str, properties: str = "") -> str:
    runs = "<w:br/>".join(f'<w:t xml:space="preserve">{escape(line, quote=False)}</w:t>' for line in text.split("\n"))
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r>{runs}</w:r></w:p>"


def _word_table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        if row:
            head = "<w:trPr><w:tblHeader/></w:trPr>" if not number else ""
            lines.append(f"<w:tr>{head}{''.join(f'<w:tc>{_paragraph(cell)}</w:tc>' for cell in row)}</w:tr>")
    return f"<w:tbl>{''.join(lines)}</w:tbl>"


def write_epub(blocks: Sequence[Block], title: str) -> bytes:
    """A book with a chapter a file, whose names are not in the order of its spine."""
    chapters = list(_chapters(blocks))
    names = [f"part{len(chapters) - number:03}.xhtml" for number in range(len(chapters))]
    page = '{}<html xmlns="http://www.w3.org/1999/xhtml"><head><title>{}</title></head><body>\n{}\n</body></html>\n'
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    items = "".join(f'<item id="{name}" href="{name}" media-type="application/xhtml+xml"/>' for name in sorted(names))
    spine = "".join(f'<itemref idref="{name}"/>' for name in names)
    links = "".join(f'<li><a href="{name}">{name}</a></li>' for name in names)
    container = (
        f'{head}<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    facts = (
        f'<dc:identifier id="id">urn:text</dc:identifier><dc:title>{escape(title)}</dc:title>'
        "<dc:language>en</dc:language>"
    )
    package = (
        f'{head}<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id">'
        f'<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">{facts}</metadata><manifest>'
        f'<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>{items}</manifest>'
        f"<spine>{spine}</spine></package>"
    )
    return archive(
        [
            ("mimetype", "application/epub+zip"),
            ("META-INF/container.xml", container),
            ("OEBPS/content.opf", package),
            ("OEBPS/nav.xhtml", page.format(head, escape(title), f"<nav><ol>{links}</ol></nav>")),
            *(
                (f"OEBPS/{name}", page.format(head, escape(title), _body(chapter)))
                for name, chapter in zip(names, chapters, strict=True)
            ),
        ]
    )


def _chapters(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    part: list[Block] = []
    for block in blocks:
        if block.kind == "heading" and block.level <= 2 and part:
            yield part
            part = []
        part.append(block)
    yield part


WRITERS: dict[str, Callable[[Sequence[Block], str], bytes]] = {
    "md": write_markdown,
    "html": write_html,
    "pdf": write_pdf,
    "docx": write_docx,
    "epub": write_epub,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a Markdown file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--formats", default=",".join(WRITERS), help="of md, html, pdf, docx, epub")
    given = parser.parse_args()
    blocks = markdown_blocks(given.source.read_text(encoding="utf-8"))
    title = next((block.text for block in blocks if block.kind == "heading"), given.source.stem)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.formats.split(","):
        (given.folder / f"{given.source.stem}.{name}").write_bytes(WRITERS[name](blocks, title))


if __name__ == "__main__":
    main()
