"""A large text becomes rows at its paragraphs: nothing of it is lost, every row fits, and each is known by its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora.data import readers, text_pieces
from qlora.data.chat import ChatTokenizer
from qlora.data.prepare import PreparedData, check_files, prepare
from qlora.data.sources import read_rows
from qlora.events import Notice, Recorder, Rejected
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.toys import FAMILIES, family_tokenizer

BOOK = "".join(
    f"Chapter {number}\n\nIt was {'a long and quiet ' * (number % 7)}day.\nNothing happened.\n \n\n"
    for number in range(60)
)


def prepared(path: Path, sink: Recorder, family: str = "qwen2", **keys: object) -> tuple[PreparedData, ChatTokenizer]:
    data = DataSection(train=(SourceSection(path=str(path)),), eval_fraction=0, **{"max_length": 64, **keys})  # type: ignore[arg-type]
    check_files(data)
    chat = ChatTokenizer(family_tokenizer(family), "assistant", Recorder())
    return prepare(data, "tokenizer", chat, 1, path.parent / "cache", sink), chat


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize(
    ("family", "truncation"), [*((family, "drop") for family in FAMILIES), ("qwen2", "cut"), ("qwen2", "error")]
)
def test_a_book_becomes_rows_of_whole_paragraphs(tmp_path: Path, family: str, truncation: str) -> None:
    (tmp_path / "book.txt").write_text(BOOK)
    sink = Recorder()
    found, chat = prepared(tmp_path / "book.txt", sink, family, truncation=truncation, max_length=128)
    rows = [chat.tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in found.train.rows]
    assert words(" ".join(rows)) == words(BOOK)
    assert max(found.train.lengths) <= 128 and len(rows) < 60 + 10
    lines = BOOK.split("\n")
    for where, row in zip(found.train.wheres, rows, strict=True):
        assert row.strip().startswith(lines[int(where.rpartition(":")[2]) - 1])
    said = [event.message for event in sink.events if isinstance(event, Notice) and event.topic == "text"]
    assert said == [f"book.txt: cut at its paragraphs into {len(rows)} rows of up to 128 tokens"]
    again = Recorder()
    prepared(tmp_path / "book.txt", again, family, truncation=truncation, max_length=128)
    assert said[0] in [event.message for event in again.events if isinstance(event, Notice)], "from the cache too"


def test_a_text_that_fits_is_one_row_to_the_letter(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("One.\n\n\nTwo.\n")
    sink = Recorder()
    found, chat = prepared(tmp_path / "note.txt", sink)
    (row,) = found.train.rows
    assert chat.tokenizer.decode(row.input_ids[:-1]) == "One.\n\n\nTwo.\n"
    assert not [event for event in sink.events if isinstance(event, Notice) and event.topic == "text"]


def test_a_paragraph_that_is_too_large_is_cut_at_lines_then_between_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 200 + "\nsecond line\n" + "x" * 4_000 + "\n\nThe end.")
    sink = Recorder()
    found, chat = prepared(tmp_path / "a.txt", sink)
    rows = [chat.tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in found.train.rows]
    assert words(" ".join(rows)) == ["word"] * 200 + ["second", "line", "The", "end."]
    (rejected,) = [event for event in sink.events if isinstance(event, Rejected)]
    assert (rejected.count, rejected.examples) == (1, ("a.txt:3",))  # a word of 4,000 letters


def test_rows_of_other_files_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"' + BOOK + '"\nshort\n')
    sink = Recorder()
    found, _ = prepared(tmp_path / "a.csv", sink)
    assert next(iter(found.train.wheres)) == "a.csv:363" and len(found.train.rows) == 1
    assert [event.reason for event in sink.events if isinstance(event, Rejected)] == ["over max_length = 64 tokens"]


def test_a_file_over_the_limit_of_a_row_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (readers, text_pieces):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 2_000)
    monkeypatch.setattr(text_pieces, "BLOCK_BYTES", 500)
    text = BOOK + "y" * 3_000 + "\nAfter.\n"
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    rows = list(read_rows(SourceSection(path=str(tmp_path / "book.txt"))))
    good = [row for row in rows if isinstance(row.row, dict)]
    assert "".join(row.row["text"] for row in good) == re.sub("y+\n", "", text)
    lines = text.split("\n")
    assert all(row.row["text"].startswith(lines[int(row.where.rpartition(":")[2]) - 1]) for row in good)
    assert max(len(row.row["text"]) for row in good) < 1_200
    (bad,) = [row for row in rows if row not in good]
    assert lines[int(bad.where.rpartition(":")[2]) - 1].startswith("yyy")
    assert rows[-1].read_bytes == (tmp_path / "book.txt").stat().st_size
