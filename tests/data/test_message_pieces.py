"""A message is written once, and as it would be with all others."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qlora.data import message_pieces
from qlora.data.call_shapes import Reading, as_templates_read_it
from qlora.data.message_pieces import MessagePieces

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "größer?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False},
    {"role": "tool", "content": "3", "tool_call_id": "a"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."},
    {"role": "assistant", "content": '<think>Hm.</think>\u2028Yes "so".'},
    {"content": "The other way around", "role": "user"},
]
SHAPES = Reading().shapes
READINGS = [
    Reading(),
    Reading(inline_thoughts=True),
    Reading(inline_thoughts=False),
    Reading(parts=True),
    Reading({kind: replace(shape, ids="nine") for kind, shape in SHAPES.items()}),
]


@pytest.mark.parametrize("kept_chars", [0, 1 << 20])
def test_the_same_json_in_every_reading(kept_chars: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_pieces, "KEPT_CHARS", kept_chars)
    pieces = MessagePieces()
    for reading in READINGS:
        for length in (0, 1, 6, 2, 6):
            assert json.loads(pieces.of(TALK[:length], reading)) == as_templates_read_it(TALK[:length], reading)


def test_a_message_in_the_place_of_a_forgotten_one_is_written_anew() -> None:
    pieces, reading = MessagePieces(), Reading()
    for number in range(1000):  # each may get the id of the one before it
        assert json.loads(pieces.of([{"role": "user", "content": str(number)}], reading))[0]["content"] == str(number)
