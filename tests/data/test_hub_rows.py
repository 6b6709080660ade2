"""Rows of the hub become local files and are recorded by their commit. Here the hub is tiny."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.data.hub_rows import download_rows, localize
from qlora.errors import DataError
from qlora.events import Progress, Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.hub_server import Hub, serve

__all__ = ["serve"]


def test_rows_of_a_data_set(serve: Callable[[Hub], Any]) -> None:
    hub = Hub(
        {"README.md": b"", "data/train-0.parquet": b"one", "data/train-1.parquet": b"two", "data/test.parquet": b"x"}
    )
    stop = serve(hub)
    sink = Recorder()
    rows = pattern, pinned = download_rows("hub:owner/rows@v1.0", sink)
    assert pinned == f"hub:owner/rows@{hub.commit}:train"
    assert sorted(path.read_bytes() for path in Path(pattern).parent.glob(Path(pattern).name)) == [b"one", b"two"]
    assert hub.downloaded() == {"train-0.parquet", "train-1.parquet"}
    assert [event.done for event in sink.events if isinstance(event, Progress)][-1] == 6
    for source, what in (
        ("hub:owner/rows:nothing", "no file of the split"),
        ("hub:owner/rows@v9", "no revision"),
        ("hub:../etc", "no name that the hub allows"),
        ("hub:a/b/c", "not of the form"),
    ):
        with pytest.raises(DataError, match=what):
            download_rows(source, Recorder())
    hub.files["other/train.csv"] = b"a,b"
    with pytest.raises(DataError, match="several places"):
        download_rows("hub:owner/rows", Recorder())
    stop()
    assert download_rows("hub:owner/rows@" + hub.commit, Recorder()) == rows


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
