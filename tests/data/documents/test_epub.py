"""Books."""

from __future__ import annotations

import io
import zipfile

import pytest

from qlora.data.documents.epub import parse
from qlora.data.documents.parsed import NotReadable
from tests.data.documents.cases import with_members, words_of, written


def test_the_spine_gives_the_order_and_the_contents_are_left_out() -> None:
    book = written("epub", "# A\n\none\n\n## B\n\ntwo\n\n## C\n\nthree\n")
    assert zipfile.ZipFile(io.BytesIO(book)).read("OEBPS/part001.xhtml").count(b"three") == 1
    assert words_of(parse(book).blocks) == ["A", "one", "B", "two", "C", "three"]


def test_entities_are_not_expanded_and_missing_chapters_counted() -> None:
    book = written("epub", "# A\n\none\n\n## B\n\ntwo\n")
    bomb = b'<!DOCTYPE h [<!ENTITY x "boom boom">]><html><body><p>A &x; B</p></body></html>'
    assert "boom" not in " ".join(words_of(parse(with_members(book, OEBPS__part001_xhtml=bomb)).blocks))
    package = zipfile.ZipFile(io.BytesIO(book)).read("OEBPS/content.opf").replace(b'href="part001', b'href="gone')
    parsed = parse(with_members(book, OEBPS__content_opf=package))
    assert words_of(parsed.blocks) == ["A", "one"]
    assert parsed.left_out == (("chapters that the book names and does not hold", 1),)


def test_a_protected_book_is_refused_and_locked_fonts_are_not() -> None:
    def locked(name: str) -> bytes:
        listed = f'<encryption><enc:CipherReference URI="{name}"/></encryption>'.encode()
        return with_members(written("epub"), **{"META-INF__encryption_xml": listed})

    with pytest.raises(NotReadable, match="protected"):
        parse(locked("OEBPS/part001.xhtml"))
    assert parse(locked("OEBPS/font.otf")).blocks


def test_a_book_without_a_list_of_contents_is_none() -> None:
    with pytest.raises(NotReadable, match="not an EPUB"):
        parse(written("docx"))


def test_a_page_of_any_name_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    book = written("epub", "# A\n\none\n\n## B\n\ntwo\n")
    opened = zipfile.ZipFile(io.BytesIO(book))
    package = opened.read("OEBPS/content.opf").replace(b"part001.xhtml", b"part001.php")
    book = with_members(book, OEBPS__content_opf=package, OEBPS__part001_php=opened.read("OEBPS/part001.xhtml"))
    assert "two" in words_of(parse(book).blocks)
    book = with_members(book, OEBPS__part001_php=b"<p>x</p>" + b" " * (2 << 20))
    with pytest.raises(NotReadable, match="times its size"):
        parse(book)
