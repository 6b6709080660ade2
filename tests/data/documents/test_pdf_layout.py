"""Lines on pages to blocks."""

from __future__ import annotations

import pytest

from qlora.data.documents.blocks import Block
from qlora.data.documents.pdf_layout import Line, blocks_of_lines, without_contents, without_repeats


def line(text: str, y: float, x: float = 72, size: float = 10, bold: bool = False, page: int = 0) -> Line:
    """A line of cells parted by two blanks, or at `x | text` places, five points a letter."""
    cells = [(x, x + 5 * len(text), text)]
    return Line(page, text, cells[0][0], cells[0][1], y, size, bold, False, tuple(cells))


def row(y: float, *cells: tuple[float, str], bold: bool = False, page: int = 0) -> Line:
    made = tuple((x, x + 5 * len(text), text) for x, text in cells)
    return Line(page, " ".join(text for _, text in cells), made[0][0], made[-1][1], y, 10, bold, False, made)


def body(page: int) -> list[Line]:
    """Nine lines that no other page has."""
    return [
        line(f"Words {'abcdefghij'[page]} of {'abcdefghij'[n]} go on and on", 700 - 12 * n, page=page) for n in range(9)
    ]


def test_headers_footers_and_numbers_are_cut_and_counted() -> None:
    pages = []
    for page in range(10):
        header = line("Pump manual" if page % 2 else f"Chapter {page // 4 + 1}: name {page // 4}", 800, page=page)
        pages.append([header, *body(page), line(f"{page + 5}", 40, page=page), line("ACME 2024", 30, page=page)])
    kept, cut = without_repeats(pages)
    assert cut == 25 and len(kept) == 95  # five headers, the numbers, the footers; chapters differ
    assert {text.text for text in kept if text.y == 800} == {
        "Chapter 1: name 0",
        "Chapter 2: name 1",
        "Chapter 3: name 2",
    }


def test_lines_that_differ_in_their_numbers_alone_are_told_apart_by_their_place() -> None:
    pages = [[line("Pump 3", 800, page=page), line("Pump 4", 780, page=page), *body(page)] for page in range(4)]
    assert without_repeats(pages)[1] == 8


def test_a_chapters_name_beside_the_pages_number_is_cut() -> None:
    pages = [[line(f"Chapter {page}: its name {page + 1}", 800, page=page), *body(page)] for page in range(8)]
    assert without_repeats(pages)[1] == 8


def test_lines_that_differ_in_a_number_of_their_own_stay() -> None:
    numbers = [3, 17, 5, 40, 2, 9]
    pages = [[*body(page), line(f"Price: {number} crowns", 500, page=page)] for page, number in enumerate(numbers)]
    assert without_repeats(pages)[1] == 0


def test_large_letters_that_count_are_headings() -> None:
    pages = [[line(f"Step {page + 1}", 800, size=16, page=page), *body(page)] for page in range(6)]
    assert without_repeats(pages)[1] == 0


def test_a_single_page_keeps_what_is_said_once() -> None:
    page = [
        line("Pump manual", 800, size=8),
        line("Pump manual", 760, size=20),
        *body(0),
        line("Page 1 of 1", 30, size=8),
    ]
    kept, cut = without_repeats([page])
    assert cut == 2 and kept[0].size == 20


def test_contents_with_dots() -> None:
    lines = [line("1 Introduction . . . . . . 3", 700), line("Prices.........12", 690), line("Wait... 3 days", 680)]
    assert [text.text for text in without_contents(lines)[0]] == ["Wait... 3 days"]


def test_paragraphs_headings_and_items() -> None:
    lines = [
        line("Manual", 760, size=20),
        line("The pump stands in the cellar and has been there for", 730),
        line("years. It is warm.", 718),
        line("A new paragraph begins after a short line that ended.", 706),
        line("Care", 680, bold=True),
        line("• the valve and what is beh", 660, x=86),
        line("ind it", 648, x=94),
        line("1. open", 630, x=86),
    ]
    assert blocks_of_lines(lines, {}) == [
        Block("heading", "Manual", 1),
        Block("paragraph", "The pump stands in the cellar and has been there for years. It is warm."),
        Block("paragraph", "A new paragraph begins after a short line that ended."),
        Block("heading", "Care", 2),
        Block("item", "the valve and what is beh ind it", 1),
        Block("item", "1. open", 1),
    ]
    assert blocks_of_lines(lines, {"care": 4})[3] == Block("heading", "Care", 4)


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        ("the pum-", "ping station", "the pumping station"),
        ("a well-", "known name, well-known", "a well-known name, well-known"),
        ("the TX-", "200 pump", "the TX-200 pump"),
        ("die Wärme-", "Pumpe", "die Wärme-Pumpe"),
        ("Ein-", "und Ausgang", "Ein- und Ausgang"),
        ("水泵在地下", "室里", "水泵在地下室里"),
        ("between 3 -", "and 5", "between 3 - and 5"),
    ],
)
def test_hyphens_at_line_ends(first: str, second: str, joined: str) -> None:
    assert [block.text for block in blocks_of_lines([line(first, 700), line(second, 688)], {})] == [joined]


def test_a_paragraph_goes_on_over_the_page() -> None:
    lines = [line("It goes on over the", 100), line("next page. Then ends.", 750, page=1), line("New.", 720, page=1)]
    assert blocks_of_lines(lines, {})[0].text == "It goes on over the next page. Then ends."


def test_columns_are_a_table_with_its_header_over_two_pages() -> None:
    head = ((72, "Code"), (172, "Means"), (302, "Do"))
    lines = [
        row(700, *head, bold=True),
        row(680, (72, "E41"), (172, "no water"), (302, "open it")),
        row(660, (72, "E42"), (172, "a long"), (302, "wait")),
        row(648, (172, "meaning")),
        row(700, *head, bold=True, page=1),
        row(680, (72, "E43"), (172, "hot"), (302, "cool"), page=1),
        line("Text below it, which is a paragraph of its own and long.", 640, page=1),
    ]
    table, text = blocks_of_lines(lines, {})
    assert table.rows == (
        ("Code", "Means", "Do"), ("E41", "no water", "open it"), ("E42", "a long meaning", "wait"),
        ("E43", "hot", "cool"),
    )  # fmt: skip
    assert text.kind == "paragraph"
