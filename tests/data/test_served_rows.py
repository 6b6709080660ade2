"""Each answer is trained once, in a row where it stands as the model must write it when it is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.data import served_rows
from qlora.data.chat import ChatTokenizer
from qlora.data.formats import Conversation
from qlora.data.prepare import PreparedData, prepare
from qlora.data.row_json import RowError
from qlora.errors import DataError
from qlora.events import Notice, Recorder, Rejected
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.shapes import CALLED, SHAPES, TALKS, shape_chat, thoughtful
from tests.data.toys import (
    WEATHER,
    assistant,
    chat_of,
    encode,
    encode_all,
    result,
    rows_of,
    system,
    talk,
    template_of,
    trained,
    user,
)

REWRITING = ["qwen3", "qwen35", "qwen35_small", "deepseek_r1", "gemma4", "gpt_oss", "lfm2"]
LOOKED_UP = (user("Weather?"), thoughtful(CALLED, "Look up."), result("3"), thoughtful(assistant("Cold."), "Three."))
PLAIN = tuple(message for text in ("One.", "Two.", "Three.") for message in (user("What?"), assistant(text)))
LONGER = {
    "two questions with calls": talk(*LOOKED_UP, *LOOKED_UP, tools=(WEATHER,)),
    "thoughts here and there": talk(
        *(user("A?"), assistant("One."), user("B?"), thoughtful(assistant("Two."), "Look up.")),
        *(user("C?"), assistant("Three."), user("D?"), assistant("Four.")),
    ),
    "context only": talk(user("A?"), assistant("One.", train=False), *PLAIN, user("B?"), assistant("No.", train=False)),
    "ends with a question": talk(system("You help."), *PLAIN, user("And now?")),
}


def answers(conversation: Conversation) -> list[int]:
    return [at for at, m in enumerate(conversation.messages) if m["role"] == "assistant" and m.get("train", True)]


@pytest.mark.parametrize("name", SHAPES)
def test_each_answer_is_trained_once_and_as_it_is_served(name: str) -> None:
    """Behind the prompt that a server sends for it, and to its end: the same text as in a row that ends with it."""
    chat = shape_chat(name)
    seen = 0
    for case, conversation in (TALKS | LONGER).items():
        rows = rows_of(chat, conversation)
        assert sorted(at for row in rows for at in answers(row)) == answers(conversation), case
        for row in rows:
            try:
                found = trained(chat, encode(chat, row))
            except RowError:
                continue
            if len(found) != len(answers(row)):
                continue  # one right behind the other: no stretch of its own
            for at, text in zip(answers(row), found, strict=True):
                alone = talk(*conversation.messages[: at + 1], tools=conversation.tools)
                lone = encode(chat, served_rows._with_answers(alone, [at]))
                assert trained(chat, lone) == [text], case
                seen += 1
    assert seen >= 15


@pytest.mark.parametrize("name", REWRITING)
def test_a_row_is_the_served_prompt_and_its_last_answer(name: str) -> None:
    chat = shape_chat(name)
    for case, conversation in (TALKS | LONGER).items():
        rows = rows_of(chat, conversation)
        for row in rows if len(rows) > 1 and name != "gemma4" else ():
            last = answers(row)[-1]
            if row.messages[last - 1]["role"] == "assistant":
                continue  # a server asks for no answer to an answer
            tokens = encode(chat, row)
            end = len(tokens.loss_weights) - tokens.loss_weights[::-1].index(1.0)
            start = end - tokens.loss_weights[:end][::-1].index(0.0)
            assert tokens.input_ids[:start] == chat.prompt_ids(row.messages[:last], row.tools), case


def test_what_stands_as_it_is_served_shares_a_row() -> None:
    """Qwen 3 keeps the thoughts since the last question: a call and the answer to its result are one row."""
    chat = shape_chat("qwen3")
    rows = rows_of(chat, LONGER["two questions with calls"])
    assert [answers(row) for row in rows] == [[1, 3], [5, 7]]
    assert [len(row.messages) for row in rows] == [4, 8]
    for row in rows:
        assert [text.count("<think>") for text in trained(chat, encode(chat, row))] == [1, 1]
    gemma = shape_chat("gemma4")
    rows = rows_of(gemma, LONGER["thoughts here and there"])
    assert [answers(row) for row in rows] == [[1, 3], [5, 7]]


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in (*REWRITING, "glm4")])
def test_a_template_that_rewrites_nothing_leaves_each_conversation_one_row(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = shape_chat(name)
    talks = [*TALKS.values(), *LONGER.values()]
    assert not chat._served_rows._needed
    monkeypatch.setattr(chat._chat_template, "render", lambda *_, **__: pytest.fail("nothing needs to be rendered"))
    assert all(row is item for item in talks for row in rows_of(chat, item))
    assert all(len(rows_of(chat, item)) == 1 for item in talks)


def test_a_conversation_that_is_right_as_it_is_stays_the_same_row() -> None:
    """Qwen 3.6 keeps thoughts in the history, and Gemma 4 writes answers without any alike everywhere."""
    for name, conversation in (
        ("qwen36", LONGER["two questions with calls"]),
        ("gemma4", talk(*PLAIN)),
        ("qwen3", talk(*LOOKED_UP, tools=(WEATHER,))),
        ("qwen3", TALKS["ends with a question"]),
    ):
        (row,) = rows_of(shape_chat(name), conversation)
        assert row is conversation, name


def test_an_end_that_only_the_last_answer_has_is_trained_of_each() -> None:
    """Harmony ends an answer with <|return|>, and one of the history with <|end|>."""
    chat = shape_chat("gpt_oss")
    texts = [text for row in encode_all(chat, talk(*PLAIN)) for text in trained(chat, row)]
    assert texts == [f"<|channel|>final<|message|>{word}.<|return|>" for word in ("One", "Two", "Three")]
    assert not chat.dropped["unended"]


def test_what_the_history_would_drop_of_a_call_stands_before_the_answer_to_its_result() -> None:
    chat = shape_chat("gpt_oss")
    _, row = encode_all(chat, TALKS["thoughts before a call"])
    assert chat.tokenizer.decode(row.input_ids).count("Look up.") == 1
    assert trained(chat, row) == ["<|channel|>final<|message|>It is cold.<|return|>"]


def test_a_template_without_an_end_has_one_row_a_conversation() -> None:
    chat = chat_of(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert len(encode_all(chat, talk(*PLAIN))) == 1


def test_generation_marks_are_followed_in_each_row() -> None:
    chat = chat_of(template_of("qwen3", marks=True))
    assert chat._chat_template.has_marks(None)
    texts = [text for row in encode_all(chat, talk(*PLAIN)) for text in trained(chat, row)]
    assert texts == [f"<think>\n\n</think>\n\n{word}.<|im_end|>" for word in ("One", "Two", "Three")]


def test_a_refused_conversation_is_refused_once() -> None:
    chat = shape_chat("qwen3")
    bad = talk(*PLAIN, user("B?"), assistant("It ends <|im_end|> here."), user("C?"), assistant("Four."))
    (row,) = rows_of(chat, bad)
    assert row is bad


def test_a_thousand_turns_are_bounded_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_rows, "MAX_CHARS", 2000)
    chat = shape_chat("qwen3")
    long = talk(*(message for number in range(40) for message in (user(f"What is {number}?"), assistant("Light."))))
    rows = rows_of(chat, long)
    counts = [len(row.messages) for row in rows]
    assert counts[:-1] == list(range(2, 2 * len(rows), 2)) and counts[-1] == 80
    assert sum(len(chat._chat_template.render(row.messages, None)) for row in rows[:-1]) <= 2000
    assert chat.dropped["long"] == 40 - len(rows) > 20


# --- on the way from files to rows --------------------------------------------------------------------------------


def prepared(tmp_path: Path, chat: ChatTokenizer, rows: list[Any], sink: Recorder, **settings: Any) -> PreparedData:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataSection(train=(SourceSection(path=str(path)),), **settings)
    return prepare(data, "tokenizer", chat, 1, tmp_path / "cache", sink)


def plain(number: int, turns: int = 3) -> dict[str, Any]:
    pairs = [(user(f"What is {number} and {turn}?"), assistant(f"It is {number}.")) for turn in range(turns)]
    return {"messages": [message for pair in pairs for message in pair]}


def test_rows_have_their_conversations_place_and_prompt_and_are_counted(tmp_path: Path) -> None:
    chat = shape_chat("qwen3")
    for _ in range(2):  # made, and read from the cache
        sink = Recorder()
        data = prepared(tmp_path, chat, [plain(1), plain(2, 1), plain(3, 2)], sink, eval_fraction=0)
        said = [event for event in sink.events if isinstance(event, Notice)]
        assert list(data.train.wheres) == ["a.jsonl:1"] * 3 + ["a.jsonl:2"] + ["a.jsonl:3"] * 2
        (split,) = [notice for notice in said if notice.topic == "turns"]
        assert split.message.startswith("2 conversations became 5 rows: the chat template writes earlier answers")
        assert split.count == 2
        assert next(notice.message for notice in said if notice.topic == "rows").startswith("6 rows, ")
        prompts = [data.train.prompt(at) for at in range(3)]
        assert [len(prompt.messages) for prompt in prompts if prompt] == [1, 3, 5]
    whole = prepared(tmp_path, shape_chat("qwen3", "all"), [plain(1)], Recorder(), eval_fraction=0)
    assert len(whole.train.lengths) == 1


def test_no_conversation_is_torn_between_training_and_evaluation(tmp_path: Path) -> None:
    chat = shape_chat("qwen3")
    rows = [plain(number, 1 + number % 4) for number in range(20)]
    rows += [plain(3, 2), plain(7, 1)]  # these begin like others: rows of equal tokens stay together as well
    for fraction in (0.02, 0.1, 0.5, 0.9):
        data = prepared(tmp_path, chat, rows, Recorder(), eval_fraction=fraction)
        held, kept = set(data.eval.wheres), set(data.train.wheres)
        assert held and kept and not held & kept
        tokens = [{tuple(row.input_ids) for row in split.rows} for split in (data.train, data.eval)]
        assert not tokens[0] & tokens[1]
    alone = prepared(tmp_path, chat, [plain(1)], Recorder(), eval_fraction=0.5)
    assert (len(alone.train.lengths), len(alone.eval.lengths)) == (3, 0)
    twice = prepared(tmp_path, chat, [plain(1), plain(1)], Recorder(), eval_fraction=0.1)
    assert (len(twice.train.lengths), len(twice.eval.lengths)) == (3, 3)


def test_each_row_meets_max_length_by_itself(tmp_path: Path) -> None:
    chat = shape_chat("qwen3")
    lengths = prepared(tmp_path, chat, [plain(1)], Recorder(), eval_fraction=0).train.lengths
    sink = Recorder()
    data = prepared(tmp_path, chat, [plain(1)], sink, eval_fraction=0, max_length=lengths[1])
    assert list(data.train.lengths) == list(lengths[:2])
    assert [event.count for event in sink.events if isinstance(event, Rejected)] == [1]
    with pytest.raises(DataError, match=f"a.jsonl:1: the row has {lengths[2]} tokens"):
        prepared(tmp_path, chat, [plain(1)], Recorder(), max_length=lengths[1], truncation="error")


def test_a_bad_conversation_counts_once(tmp_path: Path) -> None:
    bad = plain(1, 5)
    bad["messages"][5]["content"] = "It ends <|im_end|> here."
    sink = Recorder()
    data = prepared(tmp_path, shape_chat("qwen3"), [bad, plain(2, 2)], sink, eval_fraction=0, max_bad_rows=1)
    assert set(data.train.wheres) == {"a.jsonl:2"}
    assert [event.count for event in sink.events if isinstance(event, Rejected)] == [1]
