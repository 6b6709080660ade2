"""A repository from this side: its files by their hashes, uploads in parts, answers that cannot be followed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from qlora import outgoing
from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.hub_calls import Calls
from qlora.hub_upload import ModelRepository, _Action, _parts, account
from qlora.outgoing import Outgoing
from tests.push_hub import CHUNK, MAIL, USER, PushHub, Repo, push_hub

__all__ = ["push_hub"]


@pytest.fixture
def repository(push_hub: PushHub) -> ModelRepository:
    push_hub.repos[f"{USER}/a"] = Repo()
    return ModelRepository(Calls.of_user(), f"{USER}/a")


def test_whose_the_token_is(push_hub: PushHub) -> None:
    found = account(Calls.of_user())
    assert (found.name, found.email, found.may_write) == (USER, MAIL, True)
    assert found.owners == {USER: USER, "our-lab": "our-lab"}
    push_hub.role = "fineGrained"
    assert account(Calls.of_user()).may_write is None


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7])
def test_a_file_arrives_in_as_many_parts_as_it_needs(
    tmp_path: Path, push_hub: PushHub, repository: ModelRepository, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "BLOCK_BYTES", 7_000)
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "x").write_bytes(data)
    item = Outgoing("x.safetensors", size, hashlib.sha256(data).hexdigest(), tmp_path / "x")
    repository.modes([item])
    sink = Recorder()
    repository.upload([item], sink)
    assert push_hub.store == ({item.sha256: data} if size else {})  # an empty file is no object
    assert repository.sent_bytes == size == push_hub.stored_bytes()
    puts = [one for one in push_hub.calls() if one.startswith("PUT")]
    assert len(puts) == (0 if not size else 1 if size <= CHUNK else -(-size // CHUNK))
    assert not sink.events or vars(sink.events[-1])["done"] == size
    repository.upload([item], sink)
    assert push_hub.stored_bytes() == size  # it is there


def test_two_files_of_one_content_are_sent_once(push_hub: PushHub, repository: ModelRepository) -> None:
    items = [Outgoing.of_bytes(f"{name}.gguf", b"same" * 999) for name in "ab"]
    repository.modes(items)
    repository.upload(items, Recorder())
    assert push_hub.stored_bytes() == 4 * 999


def item_of(size: int) -> Outgoing:
    return Outgoing("x.gguf", size, "0" * 64, b"x" * size)


@pytest.mark.parametrize(
    "header",
    [
        {"chunk_size": "0", "1": "u"},
        {"chunk_size": "-5", "1": "u"},
        {"chunk_size": "x", "1": "u"},
        {"chunk_size": None, "1": "u"},
        {"chunk_size": [], "1": "u"},
        {"chunk_size": float("inf"), "1": "u"},  # which Python reads in JSON
        {"chunk_size": "10", "1": "u"},
        {"chunk_size": "10", "1": "u", "3": "u"},
        {"chunk_size": "10", "1": "u", "2": "u", "3": "u"},
        {"chunk_size": "1" + "0" * 30, "2": "u"},
    ],
)
def test_parts_that_do_not_make_up_the_file(header: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="parts that do not make it up"):
        _parts(_Action(href="h", header=header), item_of(15))


def test_parts_in_the_order_of_their_numbers() -> None:
    header = {"chunk_size": "5", **{str(number): f"u{number}" for number in range(12, 0, -1)}, "other": "y"}
    urls, size = _parts(_Action(href="h", header=header), item_of(58))
    assert urls == [f"u{number}" for number in range(1, 13)] and size == 5
    assert _parts(_Action(href="h"), item_of(58)) == (["h"], 58)


def test_a_repository_under_another_name_is_named(push_hub: PushHub) -> None:
    def renamed(_number: int, handler: Any) -> bool:
        handler.reply(200, {"id": "new/name", "private": True, "sha": "a" * 40, "siblings": []})
        return True

    push_hub.before = renamed
    with pytest.raises(ExportError, match="old/name: the hub calls it new/name"):
        ModelRepository(Calls.of_user(), "old/name").look()


def test_a_store_without_room_is_named(push_hub: PushHub, repository: ModelRepository) -> None:
    item = item_of(9)
    repository.modes([item])

    def full(_number: int, handler: Any) -> bool:
        error = {"oid": item.sha256, "size": 9, "error": {"code": 507, "message": "hf_secretsecretsecretsecret"}}
        handler.reply(200, {"objects": [error]})
        return True

    push_hub.before = full
    with pytest.raises(ExportError, match=r"takes no file of 9 bytes: x.gguf \(507\)") as error:
        repository.upload([item], Recorder())
    assert "space" in error.value.hint
