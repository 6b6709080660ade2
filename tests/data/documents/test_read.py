"""A recipe's documents: what is read, what is left out by name, and what is an error in two lines."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qlora.data.documents import parser, pdf
from qlora.data.documents import read as reading
from qlora.data.documents.read import read_documents
from qlora.errors import DataError
from qlora.events import Recorder
from tests.data.documents.cases import HANDBOOK, Source, read, words_of, written

ENGLISH = "# Pumps\n\nThe pump of the house is in the cellar, and it should be as warm as this.\n"


def folder(tmp_path: Path, **files: str | bytes) -> Path:
    place = tmp_path / "manuals"
    place.mkdir()
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (place / name.replace("_", ".")).write_bytes(data)
    return place


def refusal(*paths: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        read(*paths)
    assert "\n" not in caught.value.what + caught.value.hint and caught.value.hint
    return f"{caught.value.what} / {caught.value.hint}"


def test_a_folder_is_read_in_order_and_said_in_one_notice(tmp_path: Path) -> None:
    place = folder(tmp_path, b_html=written("html"), a_md=HANDBOOK, c_pdf=written("pdf"), d_docx=written("docx"))
    (place / "deep").mkdir()
    (place / "deep" / "e.epub").write_bytes(written("epub"))
    found, notices = read(place)
    names = ["manuals/a.md", "manuals/b.html", "manuals/c.pdf", "manuals/d.docx", "manuals/deep/e.epub"]
    assert [document.path for document in found.documents] == names
    assert len({document.language for document in found.documents}) == 1 and found.left_out == ()
    assert len({tuple(words_of(document.blocks)) for document in found.documents}) == 1
    assert found.documents[0].sha256 == hashlib.sha256(HANDBOOK.encode()).hexdigest()
    assert notices[0].message == "5 documents read, 5 pages" and found.pages == 5
    assert [note.message for note in notices[1:]] == [
        "of documents left out: words of navigation, page header, footer and aside: 7 (manuals/b.html)",
        "of documents left out: lines that repeat as page header, footer or page number: 2 (manuals/c.pdf)",
    ]


def test_what_cannot_be_read_in_a_folder_is_left_out_with_its_reason(tmp_path: Path) -> None:
    place = folder(
        tmp_path, good_md=ENGLISH, empty_md="", blank_txt=" \n\t\n", broken_pdf=b"%PDF-1.7 nothing", broken_docx=b"PK",
        picture_png=b"\x89PNG", sheet_xlsx=b"PK", twice_md=ENGLISH,
    )  # fmt: skip
    outside = tmp_path / "diary.md"
    outside.write_text("mine")
    (place / "link.md").symlink_to(outside)
    (place / ".hidden.md").write_text("not seen")
    os.mkfifo(place / "pipe.md")
    found, notices = read(place)
    assert [document.path for document in found.documents] == ["manuals/good.md"]
    told = {(item.where, item.reason, item.count) for item in found.left_out}
    assert ("picture.png, sheet.xlsx", "files of other kinds", 2) in told
    assert ("link.md", "links that end outside of the folder or nowhere", 1) in told
    assert ("pipe.md", "pipes, devices or sockets", 1) in told
    assert ("manuals/empty.md", "the file is empty", 1) in told
    assert ("manuals/blank.txt", "there is no text in it", 1) in told
    assert ("manuals/twice.md", "the same file as one before", 1) in told
    assert any(where == "manuals/broken.pdf" and "not a readable PDF" in reason for where, reason, _ in told)
    assert any(where == "manuals/broken.docx" and "not a readable DOCX" in reason for where, reason, _ in told)
    assert len(notices) == 1 + len(told) and not any("hidden" in note.message for note in notices)


def test_a_file_that_was_named_itself_is_an_error(tmp_path: Path) -> None:
    place = folder(tmp_path, empty_md="", broken_pdf=b"no", scan_pdf=blank_pdf(3), x_png=b"1", utf_txt=b"\0\1\2" * 99)
    assert refusal(place / "empty.md") == "empty.md: the file is empty / remove it, or name the right file in path"
    assert refusal(place / "broken.pdf").startswith("broken.pdf: not a readable PDF")
    assert "no text on its pages (scanned pictures?), 3 pages in all / run text recognition" in refusal(
        place / "scan.pdf"
    )
    assert "unknown kind of file (.png) / known endings: .md" in refusal(place / "x.png")
    assert "utf.txt: these bytes are no text" in refusal(place / "utf.txt")
    assert "no such file" in refusal(place / "none.md")
    assert "not a regular file" in refusal("/dev/null")


def test_a_folder_without_a_document_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    place = folder(tmp_path, empty_md="", picture_png=b"1")
    assert "none of its 1 documents can be read; manuals/empty.md: the file is empty" in refusal(place)
    (place / "empty.md").unlink()
    assert "no data file in this folder (1 files of other kinds left out: picture.png)" in refusal(place)
    assert "no file matches" in refusal(place / "*.md")
    assert "no file matches (1 files of other kinds left out: picture.png)" in refusal(place / "*.p*")


def blank_pdf(pages: int) -> bytes:
    from tests.data.documents.cases import writer

    made = writer()._pdf_file([""] * pages)
    assert isinstance(made, bytes)
    return made


def test_a_file_over_its_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    place = folder(tmp_path, good_md=ENGLISH)
    with (place / "huge.html").open("wb") as file:
        file.truncate(1 << 30)
    what = refusal(place / "huge.html")
    assert what.startswith("huge.html: 1,073,741,824 bytes are too many for a file of HTML (at most 33,554,432)")
    assert [item.where for item in read(place)[0].left_out] == ["manuals/huge.html"]


def test_pages_beyond_the_limit_and_pages_without_text_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "BT /F1 10 Tf 72 700 Td (The pump of the house is in the cellar.) Tj ET"
    from tests.data.documents.cases import writer

    data = writer()._pdf_file([text, "", text, "", "", text])
    parsed = pdf.parse(data)
    assert parsed.pages == 6 and parsed.left_out[-1] == ("pages without text (scanned?): 2, 4–5", 3)
    monkeypatch.setattr(pdf, "MAX_PAGES", 3)
    parsed = pdf.parse(data)
    assert parsed.pages == 3 and parsed.left_out[-1] == ("pages after the first 3", 3)


def test_a_missing_package_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path, a_md=ENGLISH, b_pdf=written("pdf"))
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    told = "b.pdf: PDF files are read by pypdfium2, which is not installed / pip install"
    assert told in refusal(place) and told in refusal(place / "b.pdf")
    assert read(place / "a.md")[0].documents[0].language == "en"


def test_a_file_that_changes_while_it_is_read_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path, a_md=ENGLISH, b_md=ENGLISH + "More.")
    kept = parser.Parser.parse

    def meanwhile(self: parser.Parser, ending: str, data: bytes) -> object:
        (place / "b.md").write_text("other")
        return kept(self, ending, data)

    monkeypatch.setattr(parser.Parser, "parse", meanwhile)
    found, _ = read(place)
    assert [item.reason for item in found.left_out] == ["the file was changed while it was read"]


def test_names_that_steer_a_terminal_are_shown_as_symbols(tmp_path: Path) -> None:
    place = folder(tmp_path)
    (place / "a\x1b[2J.md").write_text(ENGLISH)
    assert read(place)[0].documents[0].path == "manuals/a␛[2J.md"


def test_two_sources_with_their_own_about_and_language(tmp_path: Path) -> None:
    place = folder(tmp_path, a_md=ENGLISH)
    heard = Recorder()
    sources = [Source(str(place / "a.md"), "pumps"), Source(str(place), "cellars", "fr"), Source(str(place), "pumps")]
    found = read_documents(sources, heard)
    assert [(item.path, item.about, item.language) for item in found.documents] == [
        ("a.md", "pumps", "en"),
        ("manuals/a.md", "cellars", "fr"),
    ]
    assert [item.reason for item in found.left_out] == ["the same file as one before"]


def test_another_language_is_told(tmp_path: Path) -> None:
    place = folder(tmp_path, it_md="Il libro è sul tavolo e la sedia è nella cucina della casa che non ha più porte.")
    found, notices = read(place)
    assert found.documents[0].language == "other"
    assert "in another language than en, de, fr, es, zh" in notices[1].message and notices[1].count == 1


def test_all_documents_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path, a_md=ENGLISH, b_md=ENGLISH + "More.")
    monkeypatch.setattr(reading, "MAX_CHARACTERS", 100)
    assert "b.md: with it the documents have more than 100 characters" in refusal(place)
