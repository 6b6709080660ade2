"""How rows of the hub are named, and splits of folders."""

from __future__ import annotations

import ntpath
from pathlib import Path

import pytest

from qlora.recipe import pins
from qlora.recipe.pins import folder_split, parse_hub_rows


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("hub:rows", ("rows", "main", "")),
        ("hub:owner/rows@v1.0", ("owner/rows", "v1.0", "")),
        ("hub:owner/rows:test", ("owner/rows", "main", "test")),
        ("hub:owner/rows@refs/pr/1:test", ("owner/rows", "refs/pr/1", "test")),
        ("hub:a/b/c", None),
        ("hub:", None),
        ("rows.jsonl", None),
    ],
)
def test_names_of_rows(path: str, rows: tuple[str, str, str] | None) -> None:
    parsed = parse_hub_rows(path)
    assert parsed == rows
    assert parsed is None or parse_hub_rows(str(parsed)) == parsed


def test_a_split_of_a_folder_is_what_no_path_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, expected in (
        ("/rows/chats:test", ("/rows/chats", "test")),
        ("/rows:v2/chats:train_sft", ("/rows:v2/chats", "train_sft")),
        ("/rows:v2/chats", ("/rows:v2/chats", "")),
        ("/rows/*.jsonl", ("/rows/*.jsonl", "")),
        (":test", (":test", "")),
        ("/rows/chats:", ("/rows/chats:", "")),
    ):
        assert folder_split(path) == expected
    there = tmp_path / "chats:test"
    there.mkdir()
    assert folder_split(str(there)) == (str(there), "")
    monkeypatch.setattr(pins.os.path, "splitdrive", ntpath.splitdrive)
    for path, expected in (
        ("C:rows", ("C:rows", "")),
        ("C:\\rows", ("C:\\rows", "")),
        ("C:\\rows:test", ("C:\\rows", "test")),
    ):
        assert folder_split(path) == expected
