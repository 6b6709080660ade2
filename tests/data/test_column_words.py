"""Which format a file's columns make; where that is not clear, the line of the recipe that says it."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from qlora.data.column_words import FORMAT_COLUMNS, Reading, detect, is_turns, nearest_columns, renamed, suggestion
from qlora.data.formats import to_conversation
from qlora.data.row_json import RowError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GPT = {"from": "gpt", "value": "a"}


def row_of(*columns: str, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(columns, "x") | values


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (row_of(messages=TURNS), "messages"),
        (row_of("id", "prompt", messages=TURNS, tools=[]), "messages"),
        (row_of("system", conversations=TURNS), "sharegpt"),
        (row_of("prompt", "completion"), "prompt-completion"),
        (row_of("instruction", "input", "output"), "alpaca"),
        (row_of("instruction", "output", "text"), "alpaca"),
        (row_of("text", "source", "label"), "text"),
    ],
)
def test_a_format_is_told_by_its_columns(row: dict[str, Any], format: str) -> None:
    assert detect(row) == Reading(format)


PAIRS = [
    *(
        ("question", "answer"),
        ("prompt", "response"),
        ("input", "output"),
        ("query", "response"),
        ("inputs", "targets"),
    ),
    *(("Question", "Answer"), (" Prompt", "Completion "), ("problem", "solution"), ("user", "assistant")),
    *(("user_prompt", "reply"), ("Input Text", "Output-Text")),
]


@pytest.mark.parametrize(("question", "answer"), PAIRS)
def test_one_question_and_one_answer_are_read_under_any_name(question: str, answer: str) -> None:
    row = {question: "q", answer: "a", "id": 3, "category": "c"}
    reading = detect(row)
    assert reading.format == "prompt-completion"
    conversation = to_conversation(renamed(row, reading.columns), reading.format)
    assert list(conversation.messages) == TURNS
    assert [remark.name for remark in conversation.remarks] == ["category", "id"]


@pytest.mark.parametrize("answer", ["response", "completion", "answer", "Output"])
@pytest.mark.parametrize("given", ["input", "context", None])
def test_an_instruction_may_have_something_given(answer: str, given: str | None) -> None:
    row = {"instruction": "i", answer: "a"} | ({given: "g"} if given else {})
    reading = detect(row)
    assert reading.format == "alpaca"
    asked = "i\ng" if given else "i"
    assert to_conversation(renamed(row, reading.columns), "alpaca").messages[0]["content"] == asked


@pytest.mark.parametrize("name", ["conversation", "dialog", "Turns", "chat_messages", "contents"])
def test_turns_are_read_under_any_name(name: str) -> None:
    assert detect({name: TURNS, "id": "1"}) == Reading("messages", {"messages": name})
    assert str(detect({name: TURNS})) == f"messages ({name} as messages)"


AMBIGUOUS: list[dict[str, Any]] = [
    row_of("question", "context", "answer", "id"),
    row_of("problem", "solution", "answer", "source"),
    row_of("Context", "Response"),
    row_of("document", "summary"),
    row_of("title", "poem", "lang"),
    row_of("system", "chat"),
    row_of("query", "answers", id=3),
    row_of("content", n=3),
    row_of("repo_name", "path", "content"),
    row_of("id", my_turns=TURNS),
    row_of('odd "name" \\ here', "other"),
    row_of("instruction", "answer", "response"),
]


@pytest.mark.parametrize("row", AMBIGUOUS, ids=lambda row: "-".join(row))
def test_the_line_that_is_said_mends_it(row: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        detect(row)
    assert all(name in caught.value.reason for name in (*row, *FORMAT_COLUMNS))
    said = caught.value.file_hint
    line = tomllib.loads(said[said.index("format = ") :].replace(", columns", "\ncolumns"))
    conversation = to_conversation(renamed(row, line["columns"]), line["format"])
    assert conversation.messages or conversation.text


@pytest.mark.parametrize(
    ("row", "reason", "hint"),
    [
        (row_of("text", "message_id", role="prompter", parent_id=None), "each row is one message", 'format = "text"'),
        (row_of("content", role="user"), "each row is one message", '{"messages": ['),
        (row_of(prompt={"text": "x", "role": "prompter", "replies": []}), "each row is a tree", '{"messages": ['),
        (row_of(input_ids=[1], labels=[1]), "token ids of another tokenizer (input_ids)", "give the texts"),
        (row_of(data=[{"question": "q"}]), "data", "the objects in data"),
        (row_of("question", answers={"text": ["x"]}), "answers", "answers is an object: write the text of the answer"),
        (row_of(id="1", data=["q", "a"]), "data, id", "no column of it is a text or a list of turns"),
    ],
)
def test_what_is_no_conversation_is_named(row: dict[str, Any], reason: str, hint: str) -> None:
    with pytest.raises(RowError) as caught:
        detect(row)
    assert reason in caught.value.reason
    assert hint in caught.value.file_hint


PREFERENCES: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": "q"}], "chosen": GPT, "rejected": GPT},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": TURNS, "rejected": TURNS, "messages": TURNS, "score_chosen": 1, "score_rejected": 0},
    {"prompt": [TURNS[0]], "chosen": [TURNS[1]], "rejected": [TURNS[1]]},
    {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
    {"input": {"messages": [TURNS[0]]}, "preferred_output": [TURNS[1]], "non_preferred_output": [TURNS[1]]},
]


@pytest.mark.parametrize("row", PREFERENCES, ids=lambda row: "-".join(row))
def test_of_two_answers_the_line_that_is_said_trains_the_better_one(row: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="preference rows") as caught:
        detect(row)
    line = tomllib.loads(caught.value.hint.partition(": ")[2].replace(", columns", "\ncolumns"))
    conversation = to_conversation(renamed(row, line["columns"]), line["format"])
    assert list(conversation.messages)[-2:] == TURNS
    assert any("reject" in remark.name or "non_preferred" in remark.name for remark in conversation.remarks)


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        (TURNS, True),
        ('[{"role": "user", "content": "q"}]', True),
        ('[{"from": "human", "value": "q"}]', True),
        ([{"human": "q", "assistant": "a"}], True),
        ([{"user": "q"}, {"assistant": "a"}], True),
        ([{"input": "q", "output": "a"}], True),
        ([{"question": "q"}], False),
        ('[{"type": "function", "name": "f"}]', False),
        ('[{"user": "Bob"}]', False),
        ("[1, 2]", False),
        ("[{broken", False),
        ([], False),
        (["q", "a"], False),
        ("Hello", False),
    ],
)
def test_turns_are_known_by_their_roles(value: Any, is_one: bool) -> None:
    assert is_turns(value) == is_one


def test_a_wrong_name_in_columns_is_answered_with_the_nearest() -> None:
    line = nearest_columns({"instruction": "Questoin", "output": "reply"}, ["question", "reply", "id"])
    assert line == 'columns = { instruction = "question", output = "reply" }'


def test_a_table_of_ten_thousand_columns_has_a_short_hint() -> None:
    assert len(suggestion({f"column {number}": "x" for number in range(10_000)})) < 300
