"""Bytes of a text file to text: by its mark, by what it says of itself, as UTF-8, else as Western Windows text."""

from __future__ import annotations

import codecs
import re

from qlora.data.documents.parsed import NotReadable

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"))
_SHORT_MARKS = ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# The HTML standard looks for it in the first 1,024 bytes too (13.2.3.2, prescan).
_CHARSET = re.compile(rb"""<(?:meta|\?xml)[^>]{0,500}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I)
_PRESCAN_BYTES = 1024
# Names that browsers read as another encoding (WHATWG Encoding, 4.2): latin-1 pages hold Windows quotes.
_AS_BROWSERS_DO = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}
# What Python calls a codec and is none of text, or runs for very long.
_TEXT_CODECS = re.compile(r"(utf|iso8859|cp|koi8|mac|gb|big5|euc|shift|iso2022|hz|johab|tis|ptcp|kz)", re.I)
FALLBACK = "file that is not UTF-8, read as Windows-1252"
REPLACED = "bytes that are no text in its encoding"


def decoded(data: bytes, is_html: bool = False) -> tuple[str, tuple[tuple[str, int], ...]]:
    """The text, and what a reader should be told of how it was read. Raises NotReadable for bytes that are no text."""
    for mark, name in _MARKS + _SHORT_MARKS:
        if data.startswith(mark):
            return _replacing(data[len(mark) :], name)
    if is_html and (name := _said(data[:_PRESCAN_BYTES])):
        return _replacing(data, name)
    if name := _without_mark(data):
        return _replacing(data, name)
    try:
        return _checked(data.decode()), ()
    except UnicodeDecodeError:
        text, _ = _replacing(data, "cp1252")
        return text, ((FALLBACK, 1),)


def _said(head: bytes) -> str:
    """The encoding that a page names, where Python knows it; a page whose bytes were found by a name is no UTF-16."""
    found = _CHARSET.search(head)
    if found is None:
        return ""
    try:
        name = codecs.lookup(found[1].decode("ascii", "replace")).name
    except (LookupError, ValueError):
        return ""
    name = "utf-8" if name.startswith(("utf-16", "utf-32")) else _AS_BROWSERS_DO.get(name, name)
    return name if _TEXT_CODECS.match(name) else ""


def _without_mark(data: bytes) -> str:
    """UTF-16 that does not say so: every other byte of Western text is zero."""
    head = data[:1000]
    half = len(head) // 2
    if half < 2 or head.count(0) < 0.7 * half:
        return ""
    return "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"


def _replacing(data: bytes, name: str) -> tuple[str, tuple[tuple[str, int], ...]]:
    text = _checked(data.decode(name, "replace"))
    lost = text.count("\ufffd") - data.count("\ufffd".encode())
    return text, ((REPLACED, lost),) if lost > 0 else ()


def _checked(text: str) -> str:
    """Raises NotReadable where it is no text: more than one sign in a hundred is a NUL, or a lost or control one."""
    odd = sum(map(text.count, "\0\1\2\3\4\5\6\x0e\x0f\x10\x11\x12\ufffd"))
    if odd > max(8, len(text) // 100):
        raise NotReadable("these bytes are no text", "give it the ending of what it is, or remove it")
    return text
