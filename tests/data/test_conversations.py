"""A source's rows as conversations; a hint that follows from why a row is bad, and how many others are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.data.chat import ChatTokenizer
from qlora.data.conversations import bad_row, conversations
from qlora.data.formats import Conversation
from qlora.data.prepare import check_files, prepare
from qlora.data.row_json import RowError
from qlora.errors import DataError
from qlora.events import Notice, Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.cases import GOOD, lines
from tests.data.toys import family_tokenizer

USER, SAYS = GOOD["messages"]


def refusal(path: Path, **keys: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        check_files(DataSection(train=(SourceSection(path=str(path), **keys),)))
    return caught.value


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text(lines(rows))
    return folder / name


def test_the_first_good_row_of_a_file_tells_the_format_of_all(tmp_path: Path) -> None:
    readings: dict[str, Any] = {}
    rows = [{"question": "q", "answer": None}, {"question": "q", "answer": "a"}, {"prompt": "q", "completion": "a"}]
    source = SourceSection(path=str(write(tmp_path, rows)))
    found = [item for _, item in conversations(source, readings)]
    assert [isinstance(item, Conversation) for item in found] == [False, True, True]
    assert str(readings["rows.jsonl"]) == "prompt-completion (question as prompt, answer as completion)"


def test_one_broken_row_is_to_be_repaired(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "robot", "content": "x"}]}
    error = refusal(write(tmp_path, [*[GOOD] * 3, bad, *[GOOD] * 3]))
    assert error.what.startswith("rows.jsonl:4: messages[0].role is 'robot'")
    assert error.hint.startswith("repair the row")


def test_a_fault_of_all_rows_is_the_files(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "robot", "content": "x"}]}
    hint = refusal(write(tmp_path, [bad] * 30)).hint
    assert "write the role of each turn as system, user, assistant or tool" in hint and "repair" not in hint
    hint = refusal(write(tmp_path, [{"title": "t", "body": "b"}] * 5)).hint
    assert 'format = "prompt-completion", columns = { prompt = "title", completion = "body" }' in hint
    hint = refusal(write(tmp_path, [GOOD] * 5), format="sharegpt").hint
    assert 'format = "messages"' in hint
    (tmp_path / "rows.jsonl").write_text("hello\nworld\n" * 20)
    assert "a .jsonl file has one JSON object a line" in refusal(tmp_path / "rows.jsonl").hint


def test_the_unusual_row_at_the_top_is_not_the_files_fault(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, [{"comment": "rows of ours", "version": 2}, *[GOOD] * 9]))
    assert error.what.startswith("rows.jsonl:1: ") and error.hint.startswith("repair the row")


def test_disliked_answers_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": number % 2 == 0} for number in range(6)]
    error = refusal(write(tmp_path, rows))
    assert error.what.startswith("rows.jsonl:2: label is False")
    assert "train the rows marked good from a file of their own" in error.hint
    check_files(DataSection(train=(SourceSection(path=str(write(tmp_path, rows[::2]))),)))
    ignored = SourceSection(path=str(write(tmp_path, rows)), columns={"ignored_label": "label"})
    check_files(DataSection(train=(ignored,)))


def test_a_table_of_json_in_pythons_notation_is_told_so(tmp_path: Path) -> None:
    text = str([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])
    (tmp_path / "a.csv").write_text("conversations\n" + f'"{text}"\n' * 3)
    assert "Python's notation, not JSON: write the column with json.dumps" in refusal(tmp_path / "a.csv").hint


def test_a_row_that_is_a_list_of_turns_is_a_conversation(tmp_path: Path) -> None:
    source = SourceSection(path=str(write(tmp_path, [[USER, SAYS]])))
    assert [item for _, item in conversations(source, {})] == [Conversation((USER, SAYS))]


@pytest.mark.parametrize(
    ("good", "bad", "max_bad_rows", "hint"),
    [
        (9, 1, 0, "repair the row, or set data.max_bad_rows"),
        (9, 1, 3, "more than data.max_bad_rows = 3 rows are bad"),
        (4, 6, 0, "6 of 10 rows looked at are bad: repair them"),
        (0, 10, 0, "10 of 10 rows looked at fail: the way of the file"),
        (0, 1, 0, "repair the row; where all are like it: the way of the file"),
    ],
)
def test_the_hint_follows_from_how_many_fail(good: int, bad: int, max_bad_rows: int, hint: str) -> None:
    error = RowError("it is odd", file_hint="the way of the file")
    assert bad_row("a:1", error, max_bad_rows, [None] * good + [error] * bad).hint.startswith(hint)
    own = RowError("it is odd", hint="its own way")
    assert bad_row("a:1", own, max_bad_rows, [None] * good + [own] * bad).hint.startswith("its own way")


def test_keys_that_nothing_reads_are_said_once_a_file_and_from_the_cache_again(tmp_path: Path) -> None:
    chat = ChatTokenizer(family_tokenizer("qwen2"), "assistant", Recorder())
    rows = [{**GOOD, "id": number, "messages": [USER, {**SAYS, "score": number}]} for number in range(1, 4)]
    data = DataSection(train=(SourceSection(path=str(write(tmp_path, rows))),), eval_fraction=0)
    for _ in range(2):
        sink = Recorder()
        prepare(data, "tokenizer", chat, 0, tmp_path / "cache", sink)
        said = [event for event in sink.events if isinstance(event, Notice) and event.topic == "columns"]
        assert [event.message for event in said] == [
            "rows.jsonl: nothing reads id (3 rows), messages[].score (3 rows): left out"
        ]
        assert said[0].count == 6


def test_json_text_stands_wherever_an_object_may(tmp_path: Path) -> None:
    row = {"conversations": json.dumps([USER, SAYS]), "tools": "null"}
    source = SourceSection(path=str(write(tmp_path, [row])))
    assert [item for _, item in conversations(source, {})] == [Conversation((USER, SAYS))]


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("a.jsonl", '[{"text": "a"}, {"text": "b"}]\n', "an array of rows is a .json file: give it that ending"),
        ("a.jsonl", '{"prompt": "q", "completion": 4}\n' * 3, "write it as text in every row, or name the column"),
        ("a.jsonl", '{"conversations": ["q", "a"]}\n' * 3, "write each turn as an object"),
        ("a.jsonl", "3\n4\n", "each row is an object with names"),
        ("a.json", '{\n "data": [\n {"text": "a"}]\n}', "if its rows are the objects in data, write that array alone"),
        ("a.json", '{\n "text": "a"\n}', "a .json file holds one array of rows, or one row per line"),
        ("a.csv", "prompt,completion\n1,a,b\n2,c,d\n", "name every column in the first line"),
    ],
)
def test_a_file_of_another_kind_is_told_what_it_is(tmp_path: Path, name: str, text: str, hint: str) -> None:
    (tmp_path / name).write_text(text)
    assert hint in refusal(tmp_path / name).hint
