"""A corpus of broken rows and files: each is met with its `file:line` and a reason, none with a traceback."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora.data.chat import ChatTokenizer
from qlora.data.prepare import check_files, prepare
from qlora.errors import DataError
from qlora.events import Recorder, Rejected
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.cases import BROKEN_LINES, GOOD_LINE, USER, of, says
from tests.data.toys import family_tokenizer


@cache
def chat() -> ChatTokenizer:
    return ChatTokenizer(family_tokenizer("qwen2"), "assistant", Recorder())


@pytest.mark.parametrize(
    ("line", "reason"), [item[1:] for item in BROKEN_LINES], ids=[item[0] for item in BROKEN_LINES]
)
def test_a_broken_line_is_named_and_can_be_left_out(tmp_path: Path, line: str | bytes, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    raw = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    file.write_bytes(b"\n".join([GOOD_LINE.encode(), raw, GOOD_LINE.encode(), b""]))

    with pytest.raises(DataError) as caught:
        run(file)
    assert caught.value.what.startswith("rows.jsonl:2: ")
    assert reason in caught.value.what
    assert "max_bad_rows" in caught.value.hint

    rejected, rows = run(file, max_bad_rows=1)
    assert rows == 2
    assert [(entry.count, entry.examples) for entry in rejected] == [(1, ("rows.jsonl:2",))]
    assert reason in rejected[0].reason


def run(file: Path, **settings: Any) -> tuple[list[Rejected], int]:
    """Reasons for rejection and rows left. Both ways to read the rows must agree on a broken row."""
    data = DataSection(train=(SourceSection(path=str(file), format="messages"),), eval_fraction=0, **settings)
    sink = Recorder()
    prepared = prepare(data, "tokenizer", chat(), 0, file.parent / "cache", sink)
    check_files(data)
    return [event for event in sink.events if isinstance(event, Rejected)], len(prepared.train.lengths)


# (name of the file, its bytes, what is said)
FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"", "a.jsonl: the file is empty"),
    ("a.jsonl", b"\n \n\r\n", "no row"),
    ("a.jsonl", b"\xef\xbb\xbf", "no row"),
    ("a.jsonl", GOOD_LINE.encode("utf-16"), "a.jsonl: this is UTF-16 text"),
    ("a.json", b"[]", "no row"),
    ("a.json", b"[1, 2]", "a.json:1: not a JSON object but a number"),
    ("a.json", b'[\n{"a": 1},\n"x"\n]', "a.json:2: "),
    ("a.json", b"[" + GOOD_LINE.encode(), "a.json:1: broken JSON: expected a comma or ]"),
    ("a.json", b"[" + GOOD_LINE.encode() + b"\n{}]", "a.json:2: broken JSON: expected a comma or ]"),
    ("a.json", b"[" + GOOD_LINE.encode() + b",\n]", "a.json:2: broken JSON"),
    ("a.json", b"[" + GOOD_LINE.encode() + b"]\n[", "a.json:2: broken JSON: text after the end"),
    ("a.json", b'[{"a": 1,\n"b" 2}]', "a.json:2: broken JSON"),
    ("a.json", b'[{"text": "x",\n"text": "y"}]', "a.json:1: the key 'text' stands twice in one object"),
    ("a.json", b'[{"a": NaN}]', "a.json:1: broken JSON: NaN"),
    ("a.json", b'[{"a": "\\u0000"}]', "a.json:1: a text holds a NUL"),
    ("a.json", b'{\n "data": []\n}', "a.json:1: one object over several lines"),
    ("a.json", b"[" * 100_000, "a.json:1: broken JSON: nested too deep"),
    ("a.json", b'[{"a": "caf\xe9"}]', "a.json: not UTF-8 text"),
    ("a.csv", b"prompt,completion\n1,2,3\n", "a.csv:2: 3 cells, but the header names 2"),
    ("a.csv", b"prompt,completion\n1\n", "a.csv:2: 1 cells, but the header names 2"),
    ("a.csv", b'prompt,completion\n1,"2\n', "a.csv:2: broken CSV"),
    ("a.csv", b'prompt,completion\n1,"2"3\n', "a.csv:2: broken CSV"),
    ("a.csv", b"prompt,prompt\n1,2\n", "a.csv:1: two columns have the same name: prompt"),
    ("a.csv", b"prompt,\n1,2\n", "a.csv:2: no known format has these columns: prompt, unnamed column 2"),
    ("a.csv", b"prompt,completion\n", "no row"),
    ("a.csv", b"prompt,completion\nx,\n", "a.csv:2: completion: the assistant says nothing"),
    ("a.csv", b"prompt,completion\nx,a\0b\n", "a.csv:2: "),
    ("a.csv", b"prompt,completion\nx,caf\xe9\n", "a.csv: not UTF-8 text"),
    ("a.csv", b"title,body\n1,2\n", "a.csv:2: no known format has these columns: body, title"),
    ("a.parquet", b"PAR1 and then nothing PAR1", "a.parquet:1: not a readable Parquet file"),
    ("a.parquet", b"text,text", "a.parquet:1: not a readable Parquet file"),
    ("a.txt", b" \n ", "a.txt:1: text is empty"),
    ("a.txt", b"a\0b", "a.txt:1: a text holds a NUL"),
    ("a.txt", b"\xff\xfea\0b\0", "a.txt: this is UTF-16 text"),
    ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text"),
]


@pytest.mark.parametrize(("name", "content", "what"), FILES, ids=range(len(FILES)))
def test_a_broken_file_is_named_before_and_while_tokenizing(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    data = DataSection(train=(SourceSection(path=str(file)),))
    for read in (
        lambda: check_files(data),
        lambda: prepare(data, "tokenizer", chat(), 0, tmp_path / "cache", Recorder()),
    ):
        with pytest.raises(DataError) as caught:
            read()
        assert what in caught.value.what
        assert caught.value.hint
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_row_of_seven_megabytes_is_a_row_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    long = of(USER, says("now " * 5_000), notes="x" * 7_000_000)
    file.write_text("\n".join([GOOD_LINE, long]) + "\n")
    rejected, rows = run(file)
    assert rows == 1
    assert rejected[0].reason == "over max_length = 2048 tokens"
    assert rejected[0].examples == ("rows.jsonl:2",)


def test_more_bad_rows_than_allowed_are_one_too_many(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([GOOD_LINE, "{", GOOD_LINE, "{", "{"]))
    with pytest.raises(DataError, match=r"rows.jsonl:5: ") as caught:
        run(file, max_bad_rows=2)
    assert "3 of 5 rows looked at are bad" in caught.value.hint


def test_the_first_bad_row_is_the_first_in_the_file_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([GOOD_LINE, of(USER), "{"]))  # the second is only found when it is tokenized
    with pytest.raises(DataError, match=r"rows.jsonl:2: no token"):
        run(file)
