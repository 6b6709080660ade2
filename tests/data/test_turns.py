"""Turns of any export become the messages that chat templates read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora.data import turns
from qlora.data.row_json import RowError
from qlora.data.turns import REASONING_KEYS, Turns, answer
from qlora.data.unread import Ledger

USER, SAYS = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"a": 1}}}


def read(value: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages, and the names of what nothing read."""
    ledger = Ledger()
    return list(Turns(ledger).read(value, "turns")), [remark.name for remark in ledger.remarks()]


@pytest.mark.parametrize(
    "turns",
    [
        [USER, SAYS],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"from": " Human ", "value": "q"}, {"from": "ChatGPT", "value": "a"}],
        [{"role": "USER", "value": "q"}, {"from": "assistant", "content": "a"}],
        [{"sender": "human", "text": "q"}, {"sender": "assistant", "text": "a"}],
        [{"type": "human", "content": "q"}, {"type": "ai", "content": "a"}],
        [{"type": "message", **USER}, {"type": "message", **SAYS}],
        [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}],
        [{"role": "User", "content": [{"type": "input_text", "text": "q"}]}, {"role": "Chatbot", "message": "a"}],
        [{"human": "q", "assistant": "a"}],
        [{"input": "q", "output": "a"}],
        {"role": ["user", "assistant"], "content": ["q", "a"]},
        {"from": ["human", "gpt"], "value": ["q", "a"]},
        [{"user": "q"}, {"assistant": "a"}],
        json.dumps([USER, SAYS]),
        [json.dumps(USER), json.dumps(SAYS)],
        {"messages": [USER, SAYS]},
    ],
)
def test_a_question_and_an_answer_in_any_words(turns: Any) -> None:
    assert read(turns) == ([USER, SAYS], [])


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}],
        [{"role": "assistant", "tool_calls": json.dumps([CALL]).replace('"id": "call00000", ', "")}],
        [{"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}],
        [{"role": "tool_call", "content": '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'}],
        [{"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"a": 1}}}]}],
    ],
)
@pytest.mark.parametrize(
    "result",
    [
        *({"role": role, "content": "r"} for role in ("tool", "function", "tool_response")),
        *({"from": role, "value": "r"} for role in ("observation", "Tool", "function_response")),
    ],
)
def test_calls_and_results_in_any_words(turns: list[Any], result: dict[str, Any]) -> None:
    messages, unread = read([*turns, result])
    assert messages == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "r", "tool_call_id": "call00000"},
    ]
    assert unread == []


def test_blocks_of_a_turn_become_messages_in_their_order() -> None:
    said = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "ok"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
    ]
    back = [{"type": "tool_result", "tool_use_id": "t1", "content": "r"}, {"type": "text", "text": "go on"}]
    messages, unread = read([{"role": "assistant", "content": said}, {"role": "user", "content": back}])
    assert messages == [
        {"role": "assistant", "content": "ok", "reasoning_content": "hm", "tool_calls": [{**CALL, "id": "t1"}]},
        {"role": "tool", "content": "r", "tool_call_id": "t1"},
        {"role": "user", "content": "go on"},
    ]
    assert unread == []


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_thoughts_come_under_four_names(key: str) -> None:
    assert read([{**SAYS, key: "hm", "reasoning_content": "hm"}])[0] == [{**SAYS, "reasoning_content": "hm"}]
    assert read([{**SAYS, key: "hm"}]) == ([{**SAYS, "reasoning_content": "hm"}], [])
    assert read([{**USER, key: "hm"}]) == ([USER], [f"turns[].{key}"])


def test_two_thoughts_that_differ_are_refused() -> None:
    with pytest.raises(RowError, match=r"turns\[0\].reasoning and turns\[0\].thinking are two different reasonings"):
        read([{**SAYS, "thinking": "a", "reasoning": "b"}])


def test_what_nothing_reads_is_named() -> None:
    turns = [{**USER, "score": 3, "value": "other", "empty": None}, {**SAYS, "tool_calls": [], "id": "x"}]
    assert read(turns) == ([USER, SAYS], ["turns[].id", "turns[].score", "turns[].value"])


def test_tools_in_a_system_message_are_the_rows() -> None:
    turns = Turns(Ledger())
    turns.read([{"role": "system", "content": "s", "tools": '[{"name": "f"}]'}, USER], "turns")
    assert turns.tools == ({"type": "function", "function": {"name": "f"}},)
    with pytest.raises(RowError, match="other tools than those of the row"):
        turns.add_tools([{"name": "g"}], "tools")


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "agent", "content": "x"}, "turns[0].role is 'agent' (known are"),
        ({"content": "x"}, "turns[0] has no role"),
        ({"role": "assistant", "channel": "analysis", "content": "x"}, "turns[0].channel is 'analysis'"),
        ({**SAYS, "images": ["a.png"]}, "turns[0].images: this row brings images"),
        ({**SAYS, "rating": "bad"}, "turns[0].rating is 'bad'"),
        ({**USER, "function_call": {"name": "f"}}, "belong to an assistant message"),
        (
            {**SAYS, "tool_calls": [CALL], "function_call": {"name": "g"}},
            "tool_calls and function_call are not the same calls",
        ),
        (
            {"role": "user", "content": [{"type": "tool_use", "name": "f", "input": {}}]},
            "a call belongs to an assistant",
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}, {"type": "text", "text": "x"}]},
            "text behind a call",
        ),
        ({"role": "assistant", "content": []}, "the assistant says nothing"),
    ],
)
def test_what_is_unclear_is_refused_with_its_place(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read([turn])
    assert reason in caught.value.reason


def test_a_list_of_one_answer_is_that_answer() -> None:
    assert answer(["a"], "output") == SAYS
    with pytest.raises(RowError, match="output is a list of 2 answers"):
        answer(["a", "b"], "output")


USUAL = [
    *({"role": role, "content": "text"} for role in ("system", "user", "assistant", "developer", "model", "tool", "x")),
    *({"from": role, "value": "text"} for role in ("system", "human", "gpt", "function_call", "observation", " gpt")),
    *({"role": role, "content": ""} for role in ("user", "assistant")),
    *({"role": "user", "content": value} for value in (None, 3, [], {"a": 1}, [{"type": "text", "text": "t"}])),
    *({"role": role, "content": "text"} for role in (None, 3, [], "")),
    {"content": "text", "role": "user"},
    {"role": "user", "content": "text", "name": "n"},
    {"role": "assistant", "value": "text"},
]


@pytest.mark.parametrize("turn", USUAL, ids=str)
def test_a_usual_turn_is_what_it_is_among_others(turn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way of the many gives what the long way of all gives, its errors and remarks too."""

    def said() -> Any:
        try:
            return [[*message.items()] for message in read([turn])[0]], read([turn])[1]
        except RowError as error:
            return vars(error)

    usual = said()
    monkeypatch.setattr(turns, "_usual", lambda _: None)
    assert usual == said()
