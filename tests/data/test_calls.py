"""Tools, calls and results of every export become what chat templates read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora.data.calls import calls_of_text, result_text, tool_calls, tools_of
from qlora.data.row_json import RowError
from qlora.data.unread import Ledger

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize("value", [None, "", "  ", "null", "[]", " null ", [], {}, '"[]"'])
def test_no_tools_in_any_spelling(value: Any) -> None:
    assert tools_of(value, "tools") is None


@pytest.mark.parametrize(
    "value",
    [
        [ADD],
        ADD,
        ADD["function"],
        json.dumps([ADD]),
        json.dumps(json.dumps([ADD])),
        [json.dumps(ADD)],
        {"tools": [ADD]},
        [{"name": "add", "parameters": '{"type": "object"}'}],
        [{"type": "function", "function": json.dumps(ADD["function"])}],
        [{"name": "add", "input_schema": {"type": "object"}}],
        [{"functionDeclarations": [ADD["function"]]}],
    ],
)
def test_tools_in_any_spelling(value: Any) -> None:
    assert tools_of(value, "tools") == (ADD,)


@pytest.mark.parametrize(
    "value",
    [
        CALL,
        json.dumps(CALL),
        CALL["function"],
        {"name": "add", "arguments": '{"a": 1}'},
        {"type": "function", "function": {"name": "add", "arguments": json.dumps('{"a": 1}')}},
        {"name": "add", "args": {"a": 1}},
        {"name": "add", "parameters": {"a": 1}},
    ],
)
def test_calls_in_any_spelling(value: Any) -> None:
    assert tool_calls([value], "calls", Ledger()) == [CALL]


@pytest.mark.parametrize(
    "text",
    ['{"name": "add", "arguments": {"a": 1}}', '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'],
)
def test_calls_in_the_text_of_a_turn(text: str) -> None:
    assert calls_of_text(text, "value", Ledger()) == [CALL]
    assert calls_of_text(text + text if "<" in text else f"[{text}, {text}]", "value", Ledger()) == [CALL, CALL]


def test_a_key_of_a_call_that_nothing_reads_is_a_remark() -> None:
    ledger = Ledger()
    tool_calls(
        [{**CALL, "index": 0, "function": {**CALL["function"], "strict": True}}], "messages[1].tool_calls", ledger
    )
    names = [remark.name for remark in ledger.remarks()]
    assert names == ["messages[].tool_calls[].function.strict", "messages[].tool_calls[].index"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: calls_of_text("Sure! <tool_call>{}</tool_call>", "value", Ledger()), "value has other text beside"),
        (lambda: tool_calls([{"name": "f", "arguments": "[1]"}], "c", Ledger()), "c[0].arguments is a list"),
        (lambda: tool_calls([{"arguments": {}}], "c", Ledger()), "c[0] is not a tool call"),
        (lambda: tools_of([{"name": "f", "parameters": [1]}], "tools"), "tools[0].parameters is a list"),
        (lambda: tools_of("search", "tools"), "tools is text that is not JSON"),
        (lambda: tools_of([3], "tools"), "tools[0] is not a tool"),
    ],
)
def test_what_is_none_is_named(make: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        make()
    assert reason in caught.value.reason


def test_results_are_text() -> None:
    assert result_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "r") == "ab"
    assert result_text({"sum": 1}, "r") == '{"sum": 1}' and result_text("x", "r") == "x"
