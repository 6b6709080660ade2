"""Rows of each format become the messages that chat templates read; nothing is guessed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora.data.formats import Conversation, to_conversation
from qlora.data.row_json import RowError

CALL = {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {"a": 1}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def roles(conversation: Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


def test_messages_are_kept_to_the_letter() -> None:
    messages = [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "2+2?\n", "name": "Ada"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    ]
    assert to_conversation({"messages": messages}, "messages") == Conversation(tuple(messages))


def test_messages_with_tool_calls_and_results() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "add"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "x1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "x1", "content": {"sum": 1}},
            {"role": "assistant", "content": "1"},
        ],
        "tools": [ADD],
    }
    conversation = to_conversation(row, "messages")
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "x1"}]}
    assert conversation.messages[2] == {"role": "tool", "content": '{"sum": 1}', "tool_call_id": "x1"}
    assert conversation.tools == (ADD,)


def test_the_row_itself_is_not_changed() -> None:
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "{}"}]}]}
    before = json.dumps(row)
    to_conversation(row, "messages")
    assert json.dumps(row) == before


def test_calls_without_ids_get_nine_characters_and_results_the_same_in_order() -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}, {"function": {"name": "g", "arguments": {}}}]
    row = {
        "messages": [
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ]
    }
    messages = to_conversation(row, "messages").messages
    ids = [call["id"] for call in messages[0]["tool_calls"]]
    assert ids == ["call00000", "call00001"]
    assert all(len(identity) == 9 and identity.isalnum() for identity in ids)
    assert [message["tool_call_id"] for message in messages[1:]] == ids


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}])
def test_messages_can_be_context_only(flag: dict[str, Any]) -> None:
    row = {"messages": [{"role": "assistant", "content": "a", **flag}, {"role": "assistant", "content": "b"}]}
    assert [message.get("train", True) for message in to_conversation(row, "messages").messages] == [False, True]


def test_an_answer_that_is_context_only_may_be_empty() -> None:
    row = {"messages": [{"role": "assistant", "content": "", "train": False}]}
    assert to_conversation(row, "messages").messages[0]["content"] == ""


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": parts}]}
    assert to_conversation(row, "messages").messages[0]["content"] == "a b"


def test_prompt_and_completion_as_texts() -> None:
    conversation = to_conversation({"prompt": "Hi", "completion": "Ho"}, "prompt-completion")
    assert conversation.messages == ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})


def test_assistant_turns_of_a_prompt_are_context() -> None:
    prompt = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "4"}]}
    messages = to_conversation(row, "prompt-completion").messages
    assert [message.get("train", True) for message in messages if message["role"] == "assistant"] == [False, True]


def test_alpaca_with_everything() -> None:
    row = {
        "instruction": "Sum up",
        "input": "A text.",
        "output": "Short.",
        "system": "You sum up.",
        "history": [["a", "b"], ["c", "d"]],
    }
    conversation = to_conversation(row, "alpaca")
    assert roles(conversation) == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert conversation.messages[-2]["content"] == "Sum up\nA text."


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input_is_the_instruction_alone(given: dict[str, Any]) -> None:
    conversation = to_conversation({"instruction": "Go", "output": "Gone", **given}, "alpaca")
    assert conversation.messages[0]["content"] == "Go"


def test_sharegpt_with_calls_and_results() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "add"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": '{"sum": 1}'},
            {"from": "gpt", "value": "1"},
        ],
        "system": "You add.",
        "tools": json.dumps([ADD["function"]]),
    }
    conversation = to_conversation(row, "sharegpt")
    assert roles(conversation) == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2]["tool_calls"] == [CALL]
    assert conversation.messages[3]["content"] == '{"sum": 1}'
    assert conversation.tools == (ADD,)


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_is_none(tools: Any) -> None:
    row = {"conversations": [{"from": "gpt", "value": "x"}], "tools": tools}
    assert to_conversation(row, "sharegpt").tools is None


def test_messages_may_be_json_text_as_csv_holds_it() -> None:
    row = {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}
    assert roles(to_conversation(row, "messages")) == ["user", "assistant"]


def test_text_is_trained_whole() -> None:
    assert to_conversation({"text": " a\n"}, "text") == Conversation(text=" a\n")


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text"),
        ("messages", {"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}, "assistant"),
        ("messages", {"messages": [{"role": "assistant", "content": "x", "weight": 2}]}, "weight is 2"),
        ("messages", {"messages": [{"role": "assistant", "content": "x", "train": "no"}]}, "known are true and false"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "JSON"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "list"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "not a tool call"),
        ("messages", {"messages": [{"role": "user", "content": "x"}], "tools": ["f"]}, "tools[0]"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "'robot'"),
        ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "from is"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "add(1)"}]}, "not JSON"),
        ("sharegpt", {"conversations": [{"from": "system", "value": "b"}], "system": "a"}, "two system prompts"),
        ("alpaca", {"instruction": "x", "output": "y", "history": [["a"]]}, "history[0]"),
        ("alpaca", {"instruction": "x", "output": None}, "needs the column output"),
        ("prompt-completion", {"prompt": "x", "completion": " "}, "says nothing"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_conversation(row, format)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        ("sharegpt", {"conversations": [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]}),
        ("prompt-completion", {"prompt": "q", "completion": "a"}),
        (
            "prompt-completion",
            {"prompt": [{"role": "user", "content": "q"}], "completion": {"from": "gpt", "value": "a"}},
        ),
        ("prompt-completion", {"prompt": '[{"role": "user", "content": "q"}]', "completion": ["a"]}),
        (
            "prompt-completion",
            {"prompt": {"messages": [{"role": "user", "content": "q"}]}, "completion": {"text": "a"}},
        ),
        ("alpaca", {"instruction": "q", "output": "a"}),
    ],
)
@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("system", "s"),
        ("system_prompt", "s"),
        ("system", [{"type": "text", "text": "s"}]),
        ("systemInstruction", {"role": "system", "parts": [{"text": "s"}]}),
    ],
)
def test_a_system_prompt_of_a_column_is_read_in_every_format(
    format: str, row: dict[str, Any], name: str, system: Any
) -> None:
    conversation = to_conversation({**row, name: system}, format)
    assert [message["content"] for message in conversation.messages] == ["s", "q", "a"]
    assert roles(conversation) == ["system", "user", "assistant"]
    assert conversation.remarks == ()


def test_an_answer_that_is_json_itself_stays_text() -> None:
    answer = '[{"role": "user", "content": "x"}]'
    row = {"prompt": "Write a chat as JSON.", "completion": answer}
    assert to_conversation(row, "prompt-completion").messages[1]["content"] == answer


@pytest.mark.parametrize(
    "history",
    [
        [["a", "b"]],
        '[["a", "b"]]',
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"user": "a", "assistant": "b"}],
    ],
)
def test_history_in_any_spelling(history: Any) -> None:
    for row, format in (({"instruction": "c", "output": "d"}, "alpaca"), ({"prompt": "c", "completion": "d"}, "")):
        conversation = to_conversation({**row, "history": history}, format or "prompt-completion")
        assert [message["content"] for message in conversation.messages] == ["a", "b", "c", "d"]
    assert len(to_conversation({"instruction": "c", "output": "d", "history": "[]"}, "alpaca").messages) == 2


def test_old_forms_of_a_call_are_read() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "add", "content": "1"},
            {"role": "assistant", "content": "1"},
        ],
        "functions": [ADD["function"]],
    }
    conversation = to_conversation(row, "messages")
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert conversation.messages[2] == {"role": "tool", "content": "1", "name": "add", "tool_call_id": "call00000"}
    assert (conversation.tools, conversation.remarks) == ((ADD,), ())


def test_thoughts_of_a_column_are_the_answers() -> None:
    row = {"prompt": "q", "completion": "a", "thinking": "hm"}
    assert to_conversation(row, "prompt-completion").messages[1]["reasoning_content"] == "hm"
    switch = to_conversation({"prompt": "q", "completion": "a", "reasoning": "on"}, "prompt-completion")
    assert "reasoning_content" not in switch.messages[1]
    assert [remark.name for remark in switch.remarks] == ["reasoning"]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("alpaca", {"instruction": "q", "output": "a", "images": ["a.png"]}),
        ("messages", {"messages": [{"role": "user", "content": "<image>q"}], "images": []}),
        ("text", {"text": "A dog.", "image": "dog.png"}),
        ("prompt-completion", {"prompt": "q", "completion": "a", "label": False}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"}),
        ("messages", {"messages": [{"role": "assistant", "content": "a"}], "train": False}),
    ],
)
def test_what_changes_the_meaning_of_a_row_is_refused_with_a_way_out(format: str, row: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        to_conversation(row, format)
    assert caught.value.hint


def test_a_label_of_plain_text_is_only_named() -> None:
    conversation = to_conversation({"text": "A good film.", "label": 0}, "text")
    assert conversation.text and [remark.name for remark in conversation.remarks] == ["label"]
