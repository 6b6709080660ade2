"""The hub on its own: what a repository holds, its files in the cache, and one progress in bytes over all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from qlora.errors import DataError, ModelError
from qlora.events import Progress, Recorder
from qlora.hub import Repository, is_name, look_up
from tests.hub_server import Hub, serve

__all__ = ["serve"]

ROWS = Repository("owner/rows", "main", "dataset")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("rows", True), ("owner/rows", True), ("a/b/c", False), ("a/../b", False), ("a b", False), ("/rows", False)],
)
def test_names_of_repositories(text: str, allowed: bool) -> None:
    assert is_name(text) == allowed


def test_one_progress_over_all_files(serve: Callable[[Hub], Any]) -> None:
    files = {"a/one.jsonl": b"1" * 100_000, "a/empty.jsonl": b"", "b/two.jsonl": b"2" * 50_000, "c.jsonl": b"3"}
    hub = Hub(files)
    stop = serve(hub)
    snapshot = look_up(ROWS, ("*.jsonl",), Recorder())
    assert snapshot.files == {name: len(data) for name, data in files.items()} and snapshot.commit == hub.commit
    sink = Recorder()
    folder = snapshot.fetch(list(files)[:3], sink)
    assert all((folder / name).read_bytes() == files[name] for name in list(files)[:3])
    steps = [event for event in sink.events if isinstance(event, Progress)]
    assert {step.total for step in steps} == {150_000} and steps[-1].done == 150_000
    assert all(one.done <= other.done for one, other in pairwise(steps))
    stop()
    cached = look_up(ROWS, ("*.jsonl",), Recorder())
    assert cached.cached == folder == cached.fetch(["a/one.jsonl"]) and set(cached.files) == set(list(files)[:3])


def test_a_file_that_does_not_arrive(serve: Callable[[Hub], Any]) -> None:
    stop = serve(Hub({"rows.jsonl": b"{}"}))
    snapshot = look_up(ROWS, ("*.jsonl",), Recorder())
    stop()
    with pytest.raises(DataError, match=r"owner/rows: rows.jsonl could not be downloaded") as error:
        snapshot.fetch(["rows.jsonl"])
    assert "run again" in error.value.hint


@pytest.mark.parametrize("token", ["\udcff" * 10, "hf_größe", "hf_a\x1b[2J"])
def test_a_token_that_no_header_can_carry_is_named(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(ModelError, match="owner/name: the hub's token has characters that no token has") as caught:
        look_up(Repository("owner/name", "main", "model"), ["config.json"], Recorder())
    assert token not in str(caught.value) and "HF_TOKEN" in caught.value.hint
