"""Folders of `save_to_disk` are read as the rows that were saved, and refused by name where they are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from qlora.data.hub_rows import localize
from qlora.data.sources import read_rows, source_files
from qlora.errors import DataError
from qlora.events import Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.cases import read


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    splits = {"train": 5, "validation": 2, "test": 1}
    sets = {split: datasets.Dataset.from_list(rows(split, count)) for split, count in splits.items()}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "dict")
    sets["train"].save_to_disk(tmp_path / "one", num_shards=2)
    return tmp_path


def rows(split: str, count: int) -> list[dict[str, str]]:
    return [{"instruction": f"{split} {number}", "output": "ü 🌧"} for number in range(count)]


def test_a_saved_data_set_is_read_as_its_rows(saved: Path) -> None:
    assert [row.row for row in read(saved / "one")] == rows("train", 5)
    assert [row.where for row in read(saved / "one")][3:] == [
        f"data-00001-of-00002.arrow:{number}" for number in (1, 2)
    ]
    assert not source_files(SourceSection(path=str(saved / "one"))).left_out
    (saved / "one" / "cache-0123.arrow").write_bytes(b"of some map")
    found = source_files(SourceSection(path=str(saved / "one")))
    assert [file.name for file in found.files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert "1 files of the library datasets that hold no rows of the set left out: cache-0123.arrow" in (
        found.left_out_text()
    )


def test_the_splits_of_a_saved_dictionary(saved: Path) -> None:
    found = localize(DataSection(train=(SourceSection(path=str(saved / "dict")),)), Recorder()).local
    assert [row.row for row in read_rows(found.train[0])] == rows("train", 5)
    assert [row.row for row in read_rows(found.eval[0])] == rows("validation", 2)
    assert [row.row for row in read(f"{saved / 'dict'}:test")] == rows("test", 1)
    assert [row.row for row in read(saved / "dict" / "test")] == rows("test", 1)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ("{", "state.json: .*JSON"),
        ("{}", "state.json: '?_data_files"),
        ('{"_data_files": [{"filename": "../other.arrow"}]}', r"1 of its Arrow files are not there \(../other.arrow\)"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "1 of its Arrow files are not there"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}', "is a selection"),
    ],
)
def test_a_saved_data_set_that_is_not_whole_is_refused(saved: Path, state: str, what: str) -> None:
    (saved / "one" / "state.json").write_text(state)
    with pytest.raises(DataError, match=what):
        source_files(SourceSection(path=str(saved / "one")))


def test_a_file_called_state_beside_rows_is_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps([{"text": "a"}]))
    assert [row.row for row in read(tmp_path)] == [{"text": "a"}]
