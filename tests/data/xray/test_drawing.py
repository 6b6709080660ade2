"""Rows taken apart: the pieces are the row's tokens and its text, letter by letter."""

from __future__ import annotations

from pathlib import Path

from qlora.data.xray.drawing import MAX_TOKENS, draw
from tests.data.xray.cases import chat, pair, prepared, section, write


def test_pieces_are_the_row(tmp_path: Path) -> None:
    """Letters of several tokens stay whole; what is trained is what the row says."""
    rows = [pair("日本 👍🏽 naïve?", "Straße 🚀 is \u202e fine."), pair("Two?", "Yes.")]
    split = prepared(tmp_path, section([write(tmp_path / "a.jsonl", rows)])).train
    (pack,) = draw(split, [(1, 0)], 5, chat().tokenizer)
    assert (pack.number, pack.documents, [row.where for row in pack.rows]) == (1, 2, ["a.jsonl:2", "a.jsonl:1"])
    row, ids = pack.rows[1], split.rows[0].input_ids
    assert [token for piece in row.pieces for token in piece.ids] == ids
    assert "".join(piece.text for piece in row.pieces) == chat().tokenizer.decode(ids)
    assert "\ufffd" not in "".join(piece.text for piece in row.pieces)
    trained = "".join(piece.text for piece in row.pieces if piece.trained)
    assert trained == "Straße 🚀 is \u202e fine.<|im_end|>"
    assert sum(len(piece.ids) for piece in row.pieces if piece.trained) == row.trained


def test_so_many_rows_and_tokens_are_drawn(tmp_path: Path) -> None:
    rows = [pair("Long?", "word " * MAX_TOKENS), pair("Two?", "Yes."), pair("Three?", "No.")]
    split = prepared(tmp_path, section([write(tmp_path / "a.jsonl", rows)], max_length=100_000)).train
    drawn = draw(split, [(0,), (1, 2)], 2, chat().tokenizer)
    assert [len(pack.rows) for pack in drawn] == [1, 1] and drawn[1].documents == 2
    assert sum(len(piece.ids) for piece in drawn[0].rows[0].pieces) == MAX_TOKENS < drawn[0].rows[0].tokens
    assert draw(split, [(0,)], 0, chat().tokenizer) == ()
