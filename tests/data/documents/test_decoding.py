"""Bytes to text."""

from __future__ import annotations

import pytest

from qlora.data.documents.decoding import FALLBACK, REPLACED, decoded
from qlora.data.documents.parsed import NotReadable

TEXT = "Über den Fluß – für 49 €, “so” ist es."


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
    ],
)
def test_marks_and_zeros_tell_the_encoding(data: bytes) -> None:
    assert decoded(data) == (TEXT, ())


def test_what_is_not_utf8_is_windows_text_and_said() -> None:
    assert decoded(TEXT.encode("cp1252")) == (TEXT, ((FALLBACK, 1),))


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="windows-1252">', "cp1252"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">', "cp1252"),  # as browsers do
        ('<?xml version="1.0" encoding="ISO-8859-15"?>', "iso8859-15"),
        ('<meta charset="utf-16">', "utf-8"),  # whoever could read that far reads bytes
        ('<meta charset="no-such-thing">', "utf-8"),
        ('<meta charset="zip">', "utf-8"),
        ("", "utf-8"),
    ],
)
def test_a_page_says_its_own(head: str, encoding: str) -> None:
    page = f"{head}<p>Übergröße für 49 €</p>"
    assert decoded(page.encode(encoding), is_html=True) == (page, ())


def test_gb2312_is_read_as_its_superset() -> None:
    page = '<meta charset="gb2312"><p>水泵镕</p>'
    assert decoded(page.encode("gb18030"), is_html=True)[0] == page


def test_bytes_that_are_lost_are_counted_and_no_text_is_refused() -> None:
    text, told = decoded(b"\xef\xbb\xbf" + b"pump " * 400 + b"\xff\xfe")
    assert text.count("\ufffd") == 2 and told == ((REPLACED, 2),)
    for data in (b"\0\1\2\3" * 50, bytes(range(256)) * 20):
        with pytest.raises(NotReadable, match="no text"):
            decoded(data)
