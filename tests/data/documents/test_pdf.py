"""PDF by PDFium."""

from __future__ import annotations

import pytest

from qlora.data.documents.parsed import NotReadable
from qlora.data.documents.pdf import parse
from tests.data.documents.cases import words_of, written


def test_broken_files_keep_their_reason() -> None:
    whole = written("pdf")
    for data in (b"%PDF-1.4", whole[:300], b""):
        with pytest.raises(NotReadable):
            parse(data)
    damaged = whole.replace(b"startxref", b"startxxxx")  # PDFium finds the objects by itself
    assert words_of(parse(damaged).blocks) == words_of(parse(whole).blocks)


def test_an_encrypted_file_is_named_so() -> None:
    """The standard handler of revision 2 (ISO 32000-1, 7.6.3) with keys that no empty password opens."""
    lock = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <" + b"00" * 32 + b"> /U <" + b"11" * 32 + b"> >>"
    data = written("pdf").replace(b"/Root 1 0 R", b"/Root 1 0 R /ID [<00><00>] /Encrypt " + lock)
    with pytest.raises(NotReadable, match="encrypted") as caught:
        parse(data)
    assert caught.value.hint == "save a copy without a password"


def test_a_page_that_is_turned_is_read_as_it_is_shown() -> None:
    upright = written("pdf")
    turned = upright.replace(b"/Type /Page /Parent", b"/Type /Page /Rotate 180 /Parent")
    assert turned != upright
    assert sorted(words_of(parse(turned).blocks)) == sorted(words_of(parse(upright).blocks))
