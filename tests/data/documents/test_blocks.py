"""The one form of all readers."""

from __future__ import annotations

import pytest

from qlora.data.documents.blocks import Block, as_text, finished, plain, table, tidy


def test_blocks_as_markdown_like_text() -> None:
    blocks = [
        Block("heading", "Prices", 2),
        Block("item", "a", 1),
        Block("item", "b", 2),
        Block("item", "3. c", 1),
        Block("table", rows=(("Code", "Means"), ("E41", "no water"))),
        Block("table", rows=((), ("E42", "x"))),
    ]
    assert as_text(blocks) == "## Prices\n\n- a\n  - b\n3. c\n\nCode | Means\nE41 | no water\n\nE42 | x"
    assert blocks[4].words() == ["Code", "Means", "E41", "no", "water"]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("pla\u00adce\u200b \ufeffx", "place x"),
        ("o\ufb03ce", "office"),
        ("U\u0308ber", "Über"),
        ("a\u202eb\x1b[2J\x00c", "ab[2Jc"),
        ("\ud800", "\ufffd"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("a\r\nb\u2028c", "a\nb\nc"),
    ],
)
def test_what_nobody_sees_is_taken_out(text: str, seen: str) -> None:
    assert plain(text) == seen


def test_finished_blocks_hold_text() -> None:
    long = "word " * 60
    blocks = [
        Block("paragraph", " \u200b "), Block("heading", long, 1), Block("heading", "a\n b", 9),
        Block("code", "\n\tx\n"),
        Block("table", rows=(("", ""), ("", "\u00a0"))),
    ]  # fmt: skip
    assert finished(blocks) == [Block("paragraph", long.strip()), Block("heading", "a b", 6), Block("code", "    x")]
    assert tidy("  a   b\n\n c ") == "a b\nc"


@pytest.mark.parametrize(
    ("rows", "has_header", "header"),
    [
        ([["Code", "Means"], ["E41", "no water"]], None, ("Code", "Means")),
        ([["E40", "Means"], ["E41", "no water"]], None, ()),  # digits name no column
        ([["Code", ""], ["E41", "no water"]], None, ()),
        ([["Name", "Value"]], None, ()),
        ([["E40", ""], ["E41", "x"]], True, ("E40", "")),
        ([["Code", "Means"], ["E41"]], False, ()),
    ],
)
def test_the_first_row_names_the_columns_or_not(
    rows: list[list[str]], has_header: bool | None, header: tuple[str, ...]
) -> None:
    block = table(rows, has_header)
    assert block.rows[0] == header
    assert {len(row) for row in block.rows[1:]} <= {2}
