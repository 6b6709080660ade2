"""Parts of a turn's content: OpenAI's, Anthropic's, Gemini's."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.parts import CALL, RESULT, TEXT, THOUGHT, parts_of
from qlora.data.row_json import RowError
from qlora.data.unread import Ledger

CALLED = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("part", "kind", "value"),
    [
        ({"type": "text", "text": "a"}, TEXT, "a"),
        ({"type": "input_text", "text": "a"}, TEXT, "a"),
        ({"text": "a"}, TEXT, "a"),
        ({"text": "a", "thought": True}, THOUGHT, "a"),
        ({"type": "thinking", "thinking": "a", "signature": "xyz"}, THOUGHT, "a"),
        ({"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}, CALL, {**CALLED, "id": "t"}),
        ({"functionCall": {"name": "f", "args": {"a": 1}}}, CALL, CALLED),
        (
            {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "r"}]},
            RESULT,
            {"role": "tool", "content": "r", "tool_call_id": "t"},
        ),
        (
            {"functionResponse": {"name": "f", "response": {"x": 1}}},
            RESULT,
            {"role": "tool", "content": '{"x": 1}', "name": "f"},
        ),
    ],
)
def test_a_part_of_each_kind(part: dict[str, Any], kind: str, value: Any) -> None:
    ledger = Ledger()
    assert list(parts_of([part], "content", ledger)) == [(kind, value)]
    assert ledger.remarks() == ()


@pytest.mark.parametrize(
    ("part", "named"),
    [
        *(({"type": kind}, kind) for kind in ("image", "image_url", "video", "audio", "input_audio", "document")),
        ({"inlineData": {"mimeType": "image/png"}}, "inlineData"),
        ("a", "text"),
    ],
)
def test_what_is_no_text_is_refused_by_name(part: Any, named: str) -> None:
    with pytest.raises(RowError) as caught:
        list(parts_of([{"type": "text", "text": "a"}, part], "content", Ledger()))
    assert caught.value.reason == f"content[1] is a part of type '{named}': only text is trained on"
    assert caught.value.hint


def test_other_keys_of_a_part_are_remarks() -> None:
    ledger = Ledger()
    list(parts_of([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "content", ledger))
    assert [remark.name for remark in ledger.remarks()] == ["content[].cache_control"]
