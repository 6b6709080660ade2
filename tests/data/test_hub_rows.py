"""Rows of the hub become local files and are recorded by their commit. Here the hub is tiny."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.data.hub_rows import localize
from qlora.data.sources import source_files
from qlora.errors import DataError
from qlora.events import Notice, Progress, Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.hub_server import Hub, serve

__all__ = ["serve"]


def place(source: str, sink: Recorder | None = None, side: str = "train") -> tuple[str, str]:
    """A source of rows as a path of local files, and as a run records it."""
    sources = {side: (SourceSection(path=source),), "eval" if side == "train" else "train": ()}
    rows = localize(DataSection(**sources), sink or Recorder())  # type: ignore[arg-type]
    return getattr(rows.local, side)[0].path, getattr(rows.pinned, side)[0].path


def test_rows_of_a_data_set(serve: Callable[[Hub], Any]) -> None:
    hub = Hub(
        {"README.md": b"", "data/train-0.parquet": b"one", "data/train-1.parquet": b"two", "data/test.parquet": b"x"}
    )
    stop = serve(hub)
    sink = Recorder()
    rows = pattern, pinned = place("hub:owner/rows@v1.0", sink)
    assert pinned == f"hub:owner/rows@{hub.commit}:train"
    assert sorted(path.read_bytes() for path in Path(pattern).parent.glob(Path(pattern).name)) == [b"one", b"two"]
    assert hub.downloaded() == {"train-0.parquet", "train-1.parquet"}
    assert [event.done for event in sink.events if isinstance(event, Progress)][-1] == 6
    assert [event.message for event in sink.events if isinstance(event, Notice)] == [
        "hub:owner/rows: the training split is trained (2 files); the test split (1 file) is not touched"
        ' (path = "hub:owner/rows:test" names it)'
    ]
    for source, what in (
        ("hub:owner/rows:nothing", "no file of the split"),
        ("hub:owner/rows@v9", "no revision"),
        ("hub:../etc", "no name that the hub allows"),
        ("hub:a/b/c", "not of the form"),
    ):
        with pytest.raises(DataError, match=what):
            place(source)
    hub.files["other/train.csv"] = b"a,b"
    with pytest.raises(DataError, match="several places"):
        place("hub:owner/rows")
    stop()
    assert place("hub:owner/rows@" + hub.commit) == rows
    assert place(pinned) == rows


@pytest.mark.parametrize(
    ("names", "train", "evaluation"),
    [
        (("train.jsonl", "valid.jsonl", "test.jsonl"), ["train.jsonl"], ["valid.jsonl"]),
        (("rows.jsonl", "dataset_infos.json"), ["rows.jsonl"], []),
        (("alpaca_train.json", "alpaca_dev.json"), ["alpaca_train.json"], ["alpaca_dev.json"]),
        (("rows.json", "rows_test.json"), ["rows.json"], []),
        (("train/a.csv", "val/b.csv", "test/c.csv"), ["a.csv"], ["b.csv"]),
        (("train/a.csv", "train/b.csv", "test/c.csv"), ["train/a.csv", "train/b.csv"], []),
    ],
)
def test_a_data_set_means_its_training_split_and_brings_its_validation(
    serve: Callable[[Hub], Any], names: tuple[str, ...], train: list[str], evaluation: list[str]
) -> None:
    hub = Hub(dict.fromkeys(names, b"x,y\n1,2\n"))
    stop = serve(hub)
    rows = localize(DataSection(train=(SourceSection(path="hub:owner/rows"),)), Recorder())
    for found in (rows.local, rows.pinned):  # what a run records means the same files, also when the hub is gone
        again = localize(found, Recorder()).local
        assert [file.name for source in again.train for file in source_files(source).files] == train
        assert [file.name for source in again.eval for file in source_files(source).files] == evaluation
    stop()
    assert localize(rows.pinned, Recorder()).local == rows.local


def test_sections_become_local_and_pinned_in_one_call(serve: Callable[[Hub], Any]) -> None:
    hub = Hub({"train.jsonl": b"{}", "test.jsonl": b"{}"})
    serve(hub)
    train = (SourceSection(path="hub:owner/rows", weight=2.0), SourceSection(path="/rows.jsonl"))
    data = DataSection(train=train, eval=(SourceSection(path="hub:owner/rows:test"),))
    rows = localize(data, Recorder())
    assert [section.path for section in (*rows.pinned.train, *rows.pinned.eval)] == [
        *(f"hub:owner/rows@{hub.commit}:train", "/rows.jsonl", f"hub:owner/rows@{hub.commit}:test")
    ]
    local = [section.path for section in (*rows.local.train, *rows.local.eval)]
    assert [Path(path).name for path in local] == ["train*.jsonl", "rows.jsonl", "test*.jsonl"]
    assert rows.local.train[0].weight == rows.pinned.train[0].weight == 2.0
    assert sum("/api/" in path for path in hub.asked) == 2, "the hub is asked once for each source"
