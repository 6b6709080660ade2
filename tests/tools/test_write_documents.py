"""One text in five formats: what is written is read again, word by word."""

from __future__ import annotations

from importlib import import_module

import pytest

from qlora.data.documents.blocks import Block, finished
from qlora.data.documents.kinds import KINDS
from tests.data.documents.cases import HANDBOOK, words_of, writer, written

ENDINGS = ("md", "html", "pdf", "docx", "epub")


def blocks_in(ending: str, text: str) -> list[Block]:
    parse = import_module(f"qlora.data.documents.{KINDS['.' + ending].module}").parse
    return finished(parse(written(ending, text)).blocks)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_text_gives_the_same_words_and_blocks_in_each_format(ending: str) -> None:
    """Also hyphenated at line ends, with running headers and page numbers, navigation and footers around it."""
    text = HANDBOOK + "".join(
        HANDBOOK.replace("Handbuch der Wärmepumpen", f"Teil {part}").replace("Preise", f"Preisliste {part}")
        for part in range(2, 7)
    )
    assert blocks_in(ending, text) == blocks_in("md", text)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_single_page_too(ending: str) -> None:
    assert words_of(blocks_in(ending, HANDBOOK)) == words_of(blocks_in("md", HANDBOOK))


def test_lines_are_hyphenated_and_pages_many() -> None:
    """Else the test above would prove little."""
    pdf = written("pdf", HANDBOOK * 6)
    assert pdf.count(b"/Type /Page ") > 2 and pdf.count(b"-) Tj") > 5
    assert pdf.count(b"(Page 2 of ") == 1


def test_the_same_text_is_the_same_bytes() -> None:
    assert [written(ending) for ending in ENDINGS] == [written(ending) for ending in ENDINGS]


def test_a_letter_that_the_fonts_do_not_have_is_said() -> None:
    with pytest.raises(SystemExit, match="水"):
        writer().write_pdf([Block("paragraph", "水")], "title")
