"""Plain text to blocks."""

from __future__ import annotations

from qlora.data.documents.blocks import Block, finished
from qlora.data.documents.text import parse

TEXT = """\
Pump manual
===========

The pump stands in the cellar, and its pipes lead
up to the second floor.

Street 1
12345 Town

Checks
------
- the valve, which is behind the
  pump
- the filter
    * daily
1. open it
2. close it
"""


def test_paragraphs_items_and_underlined_headings() -> None:
    assert finished(parse(TEXT.replace("\n", "\r\n").encode()).blocks) == [
        Block("heading", "Pump manual", 1),
        Block("paragraph", "The pump stands in the cellar, and its pipes lead up to the second floor."),
        Block("paragraph", "Street 1 12345 Town"),
        Block("heading", "Checks", 2),
        Block("item", "the valve, which is behind the pump", 1),
        Block("item", "the filter", 1),
        Block("item", "daily", 3),
        Block("item", "1. open it", 1),
        Block("item", "2. close it", 1),
    ]


def test_a_short_line_before_a_long_one_was_ended_on_purpose() -> None:
    text = "Opening hours:\nMonday to Friday from eight in the morning until five in the evening"
    assert "\n" in finished(parse(text.encode()).blocks)[0].text
    assert parse(b"-----\n\n=====\n").blocks == []
