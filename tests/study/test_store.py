"""Records come back as they were written; a torn end is cut, and what is no record of ours is refused in two lines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora.errors import RunFolderError
from qlora.study.store import MAX_LINE, Store


@dataclass(frozen=True)
class Note:
    key: str
    texts: tuple[str, ...]


def store(folder: Path) -> Store[Note]:
    return Store(folder / "notes.jsonl", Note)


def test_records_come_back(tmp_path: Path) -> None:
    notes = [Note("a", ("ç 🌧\n", "x\u2028y")), Note("b", ()), Note("a", ("later",)), Note("c", ("",))]
    opened = store(tmp_path)
    for note in notes[:3]:
        opened.append(note)
    assert store(tmp_path).records == {"a": notes[2], "b": notes[1]} == opened.records
    opened.append(notes[3])
    assert store(tmp_path).get("b") == notes[1]


def test_a_torn_end_is_cut_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    first, second = Note("a", ("one",)), Note("b", ("two",))
    opened = store(tmp_path)
    opened.append(first)
    whole = path.read_bytes()
    opened.append(second)
    both = path.read_bytes()
    for length in range(len(whole), len(both)):
        path.write_bytes(both[:length])
        again = store(tmp_path)
        assert again.records == {"a": first} and path.read_bytes() == whole
        again.append(second)
        assert path.read_bytes() == both


@pytest.mark.parametrize(
    "data",
    [
        b'{"key": "a"}\n',
        b'{"key": "a", "texts": [1]}\n',
        b"[]\n",
        b"\xff\xfe\n",
        b'{"key": "a", "texts": ' + b"[" * 500 + b"]" * 500 + b"}\n",
        b"x" * (MAX_LINE + 2),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "notes.jsonl").write_bytes(data)
    with pytest.raises(RunFolderError, match=r"notes\.jsonl:1") as error:
        store(tmp_path)
    assert "study" in error.value.hint


def test_nothing_is_read_or_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    os.symlink(tmp_path / "elsewhere", tmp_path / "notes.jsonl")
    with pytest.raises(RunFolderError):
        store(tmp_path)
    (tmp_path / "notes.jsonl").unlink()
    os.mkfifo(tmp_path / "notes.jsonl")
    with pytest.raises(RunFolderError):
        store(tmp_path)
