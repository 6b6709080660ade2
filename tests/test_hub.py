"""The hub on its own: what a repository holds, its files in the cache, and one progress in bytes over all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from qlora import hub as network
from qlora.errors import DataError, ModelError
from qlora.events import Progress, Recorder
from qlora.hub import Reach, Repository, is_name, look_up
from tests.hub_server import TOKEN, Hub, serve

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


def test_a_hub_that_is_reached_says_whether_it_knows_us(
    serve: Callable[[Hub], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({})
    stop = serve(hub)
    hub.refusal = (200, "")
    found = network.reach(5)
    assert (found.status, found.token, found.is_usual) == (200, "sent", False) and hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.asked == ["GET /api/whoami-v2"]
    hub.refusal = (401, "")
    assert network.reach(5).status == 401
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hub.tokens.clear()
    assert network.reach(5).token == "none" and hub.tokens == {""}
    stop()
    gone = network.reach(5)
    assert gone.status is None and gone.failure == "ConnectError"


def test_what_is_not_asked_of_the_hub(serve: Callable[[Hub], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({})
    serve(hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_\nx")
    assert network.reach(5) == Reach(False, token="malformed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert network.reach(5) == Reach(False, is_offline=True) and not hub.asked


def test_a_proxys_password_is_in_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class InvalidURL(Exception):
        """httpx's is an Exception and nothing more."""

    def session() -> Any:
        raise InvalidURL("http://maria:geheim@proxy: certificate verify failed")

    monkeypatch.setattr("huggingface_hub.utils.get_session", session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert network.reach(1).failure == "InvalidURL (certificate)"
