"""Word's documents."""

from __future__ import annotations

import io
import zipfile

import mammoth
import pytest

from qlora.data.documents.docx import MACROS, parse
from qlora.data.documents.parsed import NotReadable
from tests.data.documents.cases import with_members, words_of, written


def test_macros_are_not_run_and_said() -> None:
    plain = written("docx")
    parsed = parse(with_members(plain, word__vbaProject_bin=b"\xd0\xcf\x11\xe0Sub AutoOpen()"))
    assert parsed.blocks == parse(plain).blocks and parsed.left_out == ((MACROS, 1),)


def test_entities_are_refused_before_they_are_expanded() -> None:
    xml = b'<!DOCTYPE d [<!ENTITY a "x">]><d>&a;</d>'
    for name in ("word__document_xml", "word__styles_xml", "custom_xml"):
        with pytest.raises(NotReadable, match="entities"):
            parse(with_members(written("docx"), **{name: xml}))


def test_a_title_stands_above_the_headings() -> None:
    styled = zipfile.ZipFile(io.BytesIO(written("docx", "# T\n\ntext\n\n# A\n\n## B\n\nend\n")))
    document, styles = styled.read("word/document.xml"), styled.read("word/styles.xml")
    title = b'<w:style w:type="paragraph" w:styleId="Title"><w:name w:val="Title"/></w:style></w:styles>'
    data = with_members(
        written("docx"),
        word__document_xml=document.replace(b'"Heading1"', b'"Title"', 1),
        word__styles_xml=styles.replace(b"</w:styles>", title),
    )
    headings = [(block.text, block.level) for block in parse(data).blocks if block.kind == "heading"]
    assert headings == [("T", 1), ("A", 2), ("B", 3)]


def test_an_archive_of_something_else_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("content.xml", "<x/>")
    with pytest.raises(NotReadable, match="not a DOCX"):
        parse(out.getvalue())
    assert words_of(parse(written("docx")).blocks)


def test_a_part_that_the_index_gives_another_name_is_not_read() -> None:
    """By such a name neither its size nor its entities would have been looked at."""
    plain, out = zipfile.ZipFile(io.BytesIO(written("docx"))), io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as renamed:
        for name in plain.namelist():
            content = plain.read(name).replace(b"word/document.xml", b"word/document.png")
            renamed.writestr(name.replace("document.xml", "document.png"), content)
    assert len(mammoth.convert_to_html(io.BytesIO(out.getvalue())).value) > 100
    data = out.getvalue()
    with pytest.raises(NotReadable, match="no document in it"):
        parse(data)
