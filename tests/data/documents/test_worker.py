"""What the process that reads documents answers, asked directly."""

from __future__ import annotations

import pytest

from qlora.data.documents import worker


def test_blocks_as_plain_values() -> None:
    assert worker.parse("markdown", b"# A\n\n| b | c |\n| - | - |\n| 1 | 2 |\n") == {
        "blocks": [["heading", "A", 1, ()], ["table", "", 0, (("b", "c"), ("1", "2"))]],
        "pages": 0,
        "left_out": (),
    }


def test_a_reason_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.parse("markdown", b"\n\n")["error"] == "there is no text in it"
    assert worker.parse("pdf", b"no")["hint"] == "make it anew from its source"
    assert worker.parse("no_such_reader", b"x")["error"] == "it cannot be read (there is no reader no_such_reader)"
    monkeypatch.setattr(worker, "OUTPUT_BYTES", 40)
    assert worker.parse("text", b"far too many words")["error"] == "it becomes 18 characters of text (at most 10)"
