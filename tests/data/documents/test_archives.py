"""Zip archives within bounds."""

from __future__ import annotations

import io
import zipfile

import pytest

from qlora.data.documents import archives
from qlora.data.documents.archives import member, opened
from qlora.data.documents.parsed import NotReadable


def packed(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return out.getvalue()


def refused(data: bytes) -> str:
    with pytest.raises(NotReadable) as caught:
        opened(data, "DOCX")
    assert caught.value.hint
    return caught.value.reason


def test_what_is_no_zip_is_said() -> None:
    assert refused(b"\xd0\xcf\x11\xe0" + b"x" * 99) == "not a DOCX but a file of Word 97, or one with a password"
    assert refused(b"PK\x03\x04").startswith("not a readable DOCX")
    assert refused(packed(a_xml=b"x" * 99)[:-9]).startswith("not a readable DOCX")


def test_bombs_by_ratio_sum_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "times its size" in refused(packed(a_xml=b" " * (2 << 20)))
    monkeypatch.setattr(archives, "MAX_UNPACKED", 100)
    assert refused(packed(a_xml=b"x" * 60, b_xml=b"y" * 60)) == "its text unpacks to 120 bytes (at most 100)"
    assert opened(packed(a_xml=b"x" * 60, b_png=b"y" * 600), "DOCX")  # pictures are not unpacked
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1)
    assert refused(packed(a_xml=b"x", b_xml=b"y")) == "an archive of 2 files (at most 1)"


def test_members_that_lie_about_their_size_or_are_locked() -> None:
    data = bytearray(packed(a_xml=b"x" * 1000))
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = (10).to_bytes(4, "little")  # it unpacks to more than it says
    with pytest.raises(NotReadable, match="cannot be unpacked"):
        member(opened(bytes(data), "DOCX"), "a.xml")
    data = bytearray(packed(a_xml=b"x"))
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    assert refused(bytes(data)) == "the DOCX is encrypted"
    assert member(opened(packed(a_xml=b"x"), "DOCX"), "none") is None


def test_what_an_index_calls_a_text_is_bounded_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED", 100)
    data = packed(a_xml=b"x" * 60, page_php=b"y" * 600)
    archive = opened(data, "EPUB")
    with pytest.raises(NotReadable, match="unpacks to 600 bytes"):
        archives.check_sizes(archives.named(archive, ["page.php", "gone.php", "page.php"]))
    archives.check_sizes(archives.named(archive, ["a.xml", "gone.php"]))
    with zipfile.ZipFile(io.BytesIO(archives.texts_alone(archive))) as left:
        assert left.namelist() == ["a.xml"] and left.read("a.xml") == b"x" * 60
