"""Which split a file belongs to: by folders and names, as the hub tells them; and what a folder of them means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.data.hub_rows import localize
from qlora.data.source_files import find_files
from qlora.data.sources import READERS, read_rows
from qlora.data.splits import by_split, of_split
from qlora.errors import DataError
from qlora.events import Notice, Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.cases import lines


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((f"{word}.jsonl", "train") for word in ("train", "training", "Train", "my_train", "train-v2", "rows.train")),
        *((f"{word}.csv", "validation") for word in ("validation", "valid", "val", "dev", "eval", "rows_dev2")),
        *((f"{word}.parquet", "test") for word in ("test", "testing", "test-00000-of-00003", "a test", "train_test")),
        *((f"{word}.json", "other") for word in ("rows", "latest", "trainer", "retrain", "devices", "part-00001-of-2")),
        ("data/train-00000-of-00003.parquet", "train"),
        ("train/part-0.jsonl", "train"),
        ("test/train.jsonl", "test"),
        ("deep/val/rows.jsonl", "validation"),
    ],
)
def test_the_word_that_names_a_split(name: str, split: str) -> None:
    assert getattr(by_split([name]), split) == (name,)


def test_eval_is_a_test_beside_a_validation() -> None:
    assert by_split(["dev.csv", "eval.csv", "test.csv"]).test == ("eval.csv", "test.csv")
    assert by_split(["eval.csv", "test.csv"]).validation == ("eval.csv",)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["train.csv", "train_gen-00000-of-00001.csv", "train_sft-00000-of-00001.csv"]),
        ("train_sft", ["train_sft-00000-of-00001.csv"]),
        ("training", ["train.csv", "train_gen-00000-of-00001.csv", "train_sft-00000-of-00001.csv"]),
        ("val", ["dev.csv"]),
        ("dev", ["dev.csv"]),
        ("rows", ["rows.csv"]),
        ("all", ["dev.csv", "rows.csv", "train.csv", "train_gen-00000-of-00001.csv", "train_sft-00000-of-00001.csv"]),
        ("test", []),
    ],
)
def test_a_split_that_is_named(split: str, expected: list[str]) -> None:
    assert of_split(of_split_names := sorted({*_NAMES}), split) == expected, of_split_names
    assert of_split(["a.csv", "b_test.csv"], "train") == ["a.csv"], "what belongs to no other split"


_NAMES = ("train_sft-00000-of-00001.csv", "train_gen-00000-of-00001.csv", "train.csv", "dev.csv", "rows.csv")


def folder_of(place: Path, *names: str) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(lines([{"text": name}]))
    return place


def texts(sources: tuple[SourceSection, ...]) -> list[str]:
    return [row.row["text"] for source in sources for row in read_rows(source)]  # type: ignore[index]


def means(path: Path | str, sink: Recorder | None = None, **more: Any) -> tuple[list[str], list[str]]:
    """The rows that a folder trains, and those that are evaluated on."""
    data = localize(DataSection(train=(SourceSection(path=str(path), weight=2.0),), **more), sink or Recorder()).pinned
    again = localize(data, Recorder()).local  # what a run records means the same
    return texts(again.train), texts(again.eval)


def test_a_folder_trains_its_training_split_and_evaluates_on_its_validation(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", "train.jsonl", "val.jsonl", "test.jsonl", "notes.jsonl", "deep/test/a.jsonl")
    sink = Recorder()
    assert means(folder, sink) == (["train.jsonl"], ["val.jsonl"])
    (said,) = [event for event in sink.events if isinstance(event, Notice)]
    assert said.topic == "split"
    assert said.count == 1
    assert said.message == (
        "rows: the training split is trained (1 file); the validation split (1 file) is evaluated on, and "
        'data.eval_fraction holds out no row; the test split (2 files) is not touched (path = "rows:test" names it); '
        "1 file of no split left out: notes.jsonl"
    )
    own = (SourceSection(path=str(folder / "test.jsonl")),)
    assert means(folder, sink, eval=own) == (["train.jsonl"], ["test.jsonl"])
    assert "is left out, since the recipe has [[data.eval]]" in sink.events[-1].message  # type: ignore[union-attr]
    for path, trained in (
        (f"{folder}:test", ["deep/test/a.jsonl", "test.jsonl"]),
        (f"{folder}:notes", ["notes.jsonl"]),
        (folder / "test.jsonl", ["test.jsonl"]),
        (f"{folder}/*t*.jsonl", ["notes.jsonl", "test.jsonl", "train.jsonl"]),
    ):
        assert means(path) == (trained, [])


def test_a_folder_without_words_of_splits_is_trained_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", "a.jsonl", "deep/b.jsonl")
    sink = Recorder()
    assert means(folder, sink) == (["a.jsonl", "deep/b.jsonl"], [])
    assert not sink.events
    folder_of(folder, "test/c.jsonl")
    assert means(folder, sink) == (["a.jsonl", "deep/b.jsonl"], [])
    assert "the test split (1 file) is not touched" in sink.events[-1].message  # type: ignore[union-attr]


def test_what_a_folder_of_rows_to_evaluate_on_means(tmp_path: Path) -> None:
    train = (SourceSection(path=str(folder_of(tmp_path / "a", "a.jsonl") / "a.jsonl")),)

    def evaluated(folder: Path) -> list[str]:
        sections = DataSection(train=train, eval=(SourceSection(path=str(folder)),))
        return texts(localize(localize(sections, Recorder()).pinned, Recorder()).local.eval)

    assert evaluated(folder_of(tmp_path / "b", "train.jsonl", "dev.jsonl", "test.jsonl")) == ["dev.jsonl"]
    assert evaluated(folder_of(tmp_path / "c", "one.jsonl", "two.jsonl")) == ["one.jsonl", "two.jsonl"]
    assert evaluated(folder_of(tmp_path / "d", "test.jsonl")) == ["test.jsonl"]
    with pytest.raises(DataError, match=r"has no validation split, but train \(1 file\), test \(1 file\)") as caught:
        evaluated(folder_of(tmp_path / "e", "train.jsonl", "test.jsonl"))
    assert caught.value.hint == 'name the one to evaluate on: path = "e:test"'


def test_a_folder_without_a_training_split_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows", "test.jsonl", "dev.jsonl")
    with pytest.raises(DataError, match=r"no training split, but validation \(1 file\), test \(1 file\)") as caught:
        means(folder)
    assert 'path = "rows:validation"' in caught.value.hint
    for path, what in (
        (f"{folder}:train", r"rows: has no split 'train', but validation \(1 file\), test \(1 file\)"),
        (f"{folder}:other", "has no split 'other'"),
        (f"{folder}/dev.jsonl:test", "'test' can be the split of a folder only"),
        (f"{folder}/*.jsonl:test", "'test' can be the split of a folder only"),
        (f"{tmp_path}/nothing:test", "no such file"),
    ):
        with pytest.raises(DataError, match=what):
            find_files(path, READERS)


def test_a_folder_that_is_called_like_a_split_is_a_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "rows:test", "a.jsonl")
    assert means(folder) == (["a.jsonl"], [])
    assert json.loads((folder / "a.jsonl").read_text()) == {"text": "a.jsonl"}
