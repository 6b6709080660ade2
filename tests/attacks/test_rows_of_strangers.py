"""Whole folders of rows from strangers: nothing outside of them is trained, and each bomb is refused or left out."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora.data.chat import ChatTokenizer
from qlora.data.prepare import check_files, prepare
from qlora.errors import DataError
from qlora.events import Notice, Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.toys import family_tokenizer

GOOD = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]}
LINE = json.dumps(GOOD).encode()
SECRET = "dear diary"


@cache
def chat() -> ChatTokenizer:
    return ChatTokenizer(family_tokenizer("qwen2"), "assistant", Recorder())


def trained(path: Path | str, tmp_path: Path, **settings: Any) -> tuple[list[str], Recorder]:
    """Texts of all rows of a source, as they would be trained, and what was said."""
    data = DataSection(train=(SourceSection(path=str(path)),), eval_fraction=0, **settings)
    check_files(data)
    sink = Recorder()
    prepared = prepare(data, "tokenizer", chat(), 1, tmp_path / "cache", sink)
    return [chat().tokenizer.decode(row.input_ids) for row in prepared.train.rows], sink


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*", "/**/*.txt", "/*.txt"])
def test_a_link_to_a_diary_is_not_trained(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text(SECRET)
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "good.txt").write_text("good rows")
    (data / "notes.txt").symlink_to(tmp_path / "home" / "diary.txt")
    (data / "deep" / "more.txt").symlink_to("../../home/diary.txt")
    (data / "home").symlink_to(tmp_path / "home")
    (data / "\x1b[2Jmore.txt").symlink_to("/etc/hosts")
    (data / "a").symlink_to(".")
    texts, sink = trained(f"{data}{pattern}", tmp_path)
    assert len(texts) == 1 and "good rows" in texts[0] and not any(SECRET in text for text in texts)
    (said,) = [event.message for event in sink.events if isinstance(event, Notice) and event.topic == "files"]
    assert "left out: " in said and "notes.txt" in said and "\x1b" not in said
    assert SECRET not in (tmp_path / "cache").rglob("report.json").__next__().read_text()


def test_rows_of_a_cached_run_are_of_the_same_files(tmp_path: Path) -> None:
    """What was left out is said again when the tokens are read from the cache."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.txt").write_text("good rows")
    (tmp_path / "data" / "notes.txt").symlink_to("/etc/hosts")
    said = [
        [event.message for event in trained(tmp_path / "data", tmp_path)[1].of("notice") if isinstance(event, Notice)]
        for _ in range(2)
    ]
    assert "read from" in " ".join(said[1]) and all("notes.txt" in " ".join(messages) for messages in said)


# (ending, what is in the file, part of the refusal; "" where the rest is trained)
BOMBS: dict[str, tuple[str, bytes, str]] = {
    "lists in lines": (".jsonl", b"[],\n" * 50_000, "broken JSON"),
    "lists in an array": (".json", b"[" + b"[]," * 500_000 + b"[]]", "not a JSON object but a list"),
    "lists without an array": (".json", b"[]," * 500_000, "text after the end of the array"),
    "lists as messages": (".jsonl", b'{"messages":[' + b"[]," * 200_000 + b"[]]}", "messages[0] is a list"),
    "lists beside the text": (".jsonl", b'{"text":"a","x":[' + b"{}," * 200_000 + b"{}]}", ""),
    "one line without an end": (".jsonl", b"[" * 9_000_000, "no rows but 1 that are too long"),
    "a long row in an array": (".json", b'[{"text":"\\\\ [",' + b'"a":"' + b"x" * 9_000_000 + b'"},' + LINE + b"]", ""),
    "an array that breaks off": (".json", b"[" + LINE + b"," + LINE[:40], "broken JSON"),
    "a long row that breaks off": (".json", b'[{"text":"' + b"x" * 9_000_000, "the file ends within a row"),
    "deep lists": (".jsonl", b'{"text":"a","x":' + b"[" * 100 + b"]" * 100 + b"}", "nested too deep"),
    "deep lists in an array": (".json", b'[{"text":"a","x":' + b"[" * 100 + b"]" * 100 + b"}]", "nested too deep"),
    "very deep lists": (".json", b"[" * 1_000_000, "nested too deep"),
    "many keys": (".jsonl", json.dumps({f"k{n}": n for n in range(100_000)}).encode(), "and 99,990 more"),
    "a long key": (".jsonl", json.dumps({"k" * 1_000_000: 1}).encode(), "these columns: kkk"),
    "a long number": (".jsonl", b'{"text":"a","n":' + b"9" * 10_000 + b"}", "more than 4,300 digits"),
    "a long number in an array": (".json", b'[{"text":"a","n":' + b"9" * 10_000 + b"}]", "more than 4,300 digits"),
    "an endless number": (".jsonl", b'{"text":"a","n":1e99999}', "too large"),
    "half of a pair": (".json", b'[{"text":"\\ud800"}]', "half of a surrogate pair"),
    "NUL": (".csv", b"text\na\0b\n", "NUL"),
    "NUL in a text": (".txt", b"a\0b", "NUL"),
    "nothing but NUL": (".jsonl", bytes(1_000_000), "broken JSON"),
    "many columns": (".csv", b",".join(b"c%d" % n for n in range(20_000)), "20,000 columns are too many"),
    "many cells": (".csv", b"text\n" + b"," * 1_000_000, "1,000,001 cells, but the header names 1 columns"),
    "a quote without an end": (".csv", b'text\n"' + b"x\n" * 100_000, "broken CSV"),
    "a header without an end": (".csv", b"x" * 9_000_000, "broken header: over 8 MiB"),
    "a gzip": (".jsonl", b"\x1f\x8b\x08" + bytes(20), "this is an archive"),
    "a zip": (".csv", b"PK\x03\x04" + bytes(20), "this is an archive"),
    "a zstd": (".json", b"\x28\xb5\x2f\xfd" + bytes(20), "this is an archive"),
    "an xz": (".txt", b"\xfd7zXZ\0" + bytes(20), "this is an archive"),
    "a long text": (".txt", b"word " * 2_000_000, "no rows but 1 that are too long"),
    "one long word": (".jsonl", json.dumps({"text": "a" * 1_000_000}).encode() + b'\n{"text":"b"}', ""),
    "white space": (".jsonl", json.dumps({"text": " " * 1_000_000 + "a"}).encode() + b'\n{"text":"b"}', ""),
    "many answers": (".jsonl", json.dumps({"messages": GOOD["messages"] * 8_000}).encode(), "are too many for one row"),
    "a long role": (".jsonl", json.dumps({"messages": [{"role": "x" * 1_000_000}]}).encode(), "role is 'xxx"),
    "a role of lists": (".jsonl", b'{"messages":[{"role":' + b"[[1]]" * 1 + b"}]}", "role is [[1]]"),
    "parquet without a footer": (".parquet", b"PAR1" + bytes(100) + b"PAR1", "not a readable Parquet file"),
    "parquet with a huge footer": (".parquet", b"PAR1" + b"\xff\xff\xff\x7fPAR1", "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_its_place_or_left_out(tmp_path: Path, name: str) -> None:
    ending, data, refusal = BOMBS[name]
    path = tmp_path / f"rows{ending}"
    path.write_bytes(data)
    if not refusal:
        texts, _ = trained(path, tmp_path)
        assert len(texts) == 1
        return
    with pytest.raises(DataError) as caught:
        trained(path, tmp_path)
    assert refusal in caught.value.what and f"rows{ending}" in caught.value.what
    assert len(caught.value.what) < 1000 and "\n" not in caught.value.what + caught.value.hint and caught.value.hint


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/stdin", "/dev/null", "/proc/self/mem", "/proc/self/environ"])
def test_what_is_no_file_of_rows_is_refused_under_any_name(tmp_path: Path, place: str) -> None:
    for name, link in (("rows.jsonl", True), ("data/rows.jsonl", True), (place, False)):
        path = tmp_path / name if link else Path(place)
        path.parent.mkdir(exist_ok=True)
        if link:
            path.symlink_to(place)
        with pytest.raises(DataError) as caught:
            trained(path.parent if name.startswith("data") else path, tmp_path)
        assert caught.value.hint and "\n" not in caught.value.what
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        trained(tmp_path / "pipe.jsonl", tmp_path)


def test_a_file_that_changes_between_hash_and_reading_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens would lie in the cache under the hash of the other content."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE)
    os.utime(path, (1, 1))
    encode = ChatTokenizer.encode_many

    def changing(self: ChatTokenizer, *arguments: Any) -> Any:
        path.write_bytes(LINE.replace(b"It.", b"No."))
        return encode(self, *arguments)

    monkeypatch.setattr(ChatTokenizer, "encode_many", changing)
    (tmp_path / "more.jsonl").write_bytes(LINE)
    data = DataSection(train=(SourceSection(path=str(path)), SourceSection(path=str(path))), eval_fraction=0)
    with pytest.raises(DataError, match=r"rows.jsonl: the file was changed while it was read"):
        prepare(data, "tokenizer", chat(), 1, tmp_path / "cache", Recorder())
    assert not list((tmp_path / "cache").rglob("*.arrow"))
