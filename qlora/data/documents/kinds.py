"""Which files are documents: by their ending, with the module that reads them and the package that it needs."""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1 << 20
# What a page of bs4's tree takes: about 20 bytes for each of the file's, within the memory that a reader has.
_MARKUP, _TEXT, _PACKED, _PDF = 32 * _MIB, 64 * _MIB, 256 * _MIB, 256 * _MIB


@dataclass(frozen=True)
class FileKind:
    """`name` for people; `module` of this package has `parse(bytes) -> Parsed`; `packages`: (import name, pip's)."""

    name: str
    module: str
    max_bytes: int
    packages: tuple[tuple[str, str], ...] = ()


_SOUP = ("bs4", "beautifulsoup4")
_MARKDOWN = FileKind("Markdown", "markdown", _MARKUP)
_HTML = FileKind("HTML", "html", _MARKUP, (_SOUP,))
_DOCX = FileKind("DOCX", "docx", _PACKED, (("mammoth", "mammoth"), _SOUP))
KINDS: dict[str, FileKind] = {
    ".md": _MARKDOWN,
    ".markdown": _MARKDOWN,
    ".html": _HTML,
    ".htm": _HTML,
    ".xhtml": _HTML,
    ".txt": FileKind("text", "text", _TEXT),
    ".pdf": FileKind("PDF", "pdf", _PDF, (("pypdfium2", "pypdfium2"),)),
    ".docx": _DOCX,
    ".docm": _DOCX,
    ".epub": FileKind("EPUB", "epub", _PACKED, (_SOUP,)),
}
