"""A push to a hub on this machine: interrupted anywhere and resumed, private, never over what others put there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from qlora import manifest
from qlora.errors import ExportError
from qlora.events import Event, Notice, Recorder
from qlora.export.parcel import PublishedFolder
from qlora.export.push import Contents, Push, open_destination
from tests.push_hub import TOKEN, USER, PushHub, Repo, an_export, push, push_hub

__all__ = ["push_hub"]


NOTHING = Contents((), frozenset())


def test_an_export_arrives_in_one_commit_in_a_private_repository(tmp_path: Path, push_hub: PushHub) -> None:
    folder, sink = an_export(tmp_path / "hf"), Recorder()
    pushed = push(folder, sink=sink)
    repo = push_hub.repos[f"{USER}/support"]
    assert repo.private and len(repo.commits) == 2 and pushed.commit == repo.head and not pushed.public
    assert pushed.repository == f"{USER}/support" and pushed.url == f"{push_hub.endpoint}/{USER}/support"
    names = {path.name for path in folder.iterdir()}
    assert set(repo.files) == names | {".gitattributes"}
    for name in names - {"README.md", "manifest.json"}:
        held = repo.files[name]
        assert (push_hub.store[held] if isinstance(held, str) else held) == (folder / name).read_bytes(), name
    said = manifest.of_text(repo.files["manifest.json"], "manifest.json")  # type: ignore[arg-type]
    assert said["kind"] == "push" and set(said["files"]) == names - {"manifest.json"}
    assert pushed.sent_bytes >= push_hub.stored_bytes() == sum(map(len, push_hub.store.values()))
    assert [one.done for one in sink.events if one.kind == "progress"][-1] == sum(map(len, push_hub.store.values()))  # type: ignore[attr-defined]
    assert any(
        isinstance(one, Notice) and repo.head[:12] in one.message and "private" in one.message for one in sink.events
    )
    again = push(folder)
    assert again.commit == repo.head and len(repo.commits) == 2 and again.there_already == again.files
    assert push_hub.stored_bytes() == sum(map(len, push_hub.store.values()))


def test_what_takes_a_files_name_meanwhile_is_not_sent(tmp_path: Path, push_hub: PushHub) -> None:
    folder = an_export(tmp_path / "hf")

    def swap(_number: int, handler: Any) -> bool:
        if "/batch" in handler.path:
            weights = folder / "hf-1.safetensors"
            (tmp_path / "other").write_bytes(b"private " * 9_999)
            os.truncate(tmp_path / "other", weights.stat().st_size)
            os.replace(tmp_path / "other", weights)
        return False

    push_hub.before = swap
    with pytest.raises(ExportError, match=r"hf-1.safetensors: was changed while it was sent"):
        push(folder)
    assert b"private private" not in push_hub.everything() and len(push_hub.repos[f"{USER}/support"].commits) == 1


def test_a_repository_that_is_opened_to_everybody_meanwhile_gets_no_commit(tmp_path: Path, push_hub: PushHub) -> None:
    def open_up(_number: int, handler: Any) -> bool:
        if handler.command == "PUT":
            push_hub.repos[f"{USER}/support"].private = False
        return False

    push_hub.before = open_up
    with pytest.raises(ExportError, match="is there and public, and a push is private"):
        push(an_export(tmp_path / "hf"))
    assert set(push_hub.repos[f"{USER}/support"].files) == {".gitattributes"}


def requests_of_a_push(hub: PushHub, folder: Path) -> int:
    push(folder)
    count = len(hub.received)
    for kept in (hub.repos, hub.store, hub.parts, hub.received):
        kept.clear()  # type: ignore[attr-defined]
    return count


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_push_that_breaks_off_at_any_request_goes_on(
    tmp_path: Path, push_hub: PushHub, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Each request once without an answer, and without a second try: done by the hub or not, the next push ends it."""
    monkeypatch.setattr("qlora.hub_calls.WAITS", ())
    folder = an_export(tmp_path / "hf")
    total = requests_of_a_push(push_hub, folder)
    assert total > 12
    for at in range(1, total + 1):
        for kept in (push_hub.repos, push_hub.store, push_hub.parts, push_hub.received):
            kept.clear()  # type: ignore[attr-defined]
        setattr(push_hub, moment, lambda number, handler, at=at: number == at and handler.break_off())
        with pytest.raises(ExportError, match=r"cannot be reached") as error:
            push(folder)
        assert "run the same again" in error.value.hint
        before = dict(push_hub.store)
        repo = push_hub.repos.get(f"{USER}/support", Repo())
        assert len(repo.commits) == 2 or set(repo.files) == {".gitattributes"}  # all of it, or nothing
        setattr(push_hub, moment, lambda _number, _handler: False)
        done = len(push_hub.received)
        pushed = push(folder)
        repo = push_hub.repos[f"{USER}/support"]
        assert len(repo.commits) == 2 and repo.head == pushed.commit and repo.private
        again = [path.split("/")[2] for method, path, _, _ in push_hub.received[done:] if method == "PUT"]
        assert not set(again) & set(before), at  # what had arrived is not sent again


def test_a_push_that_is_stopped_goes_on(tmp_path: Path, push_hub: PushHub) -> None:
    class Stopping(Recorder):
        def emit(self, event: Event) -> None:
            super().emit(event)
            if event.kind == "progress" and vars(event)["done"] > 50_000:  # in the middle of the second file
                raise KeyboardInterrupt

    folder = an_export(tmp_path / "hf")
    with pytest.raises(KeyboardInterrupt):
        push(folder, sink=Stopping())
    (first,) = push_hub.store
    done = len(push_hub.received)
    push(folder)
    assert not [one for one in push_hub.received[done:] if one[0] == "PUT" and first in one[1]]
    assert len(push_hub.store) == 2 and len(push_hub.repos[f"{USER}/support"].commits) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(tmp_path: Path, push_hub: PushHub, status: int) -> None:
    folder, sink = an_export(tmp_path / "hf"), Recorder()
    total = requests_of_a_push(push_hub, folder)
    busy: set[str] = set()

    def once(_number: int, handler: Any) -> bool:
        """Each request is refused the first time."""
        if handler.path in busy or "/commit/" in handler.path:
            return False
        busy.add(handler.path)
        handler.reply(status, {"error": TOKEN}, Retry_After="0")
        return True

    push_hub.before = once
    push(folder, sink=sink)
    told = [one for one in sink.events if isinstance(one, Notice) and one.topic == "hub"]
    assert len(told) == 1 and f"it answers {status}" in told[0].message and (told[0].count or 0) >= total // 2
    assert len(push_hub.repos[f"{USER}/support"].commits) == 2


REFUSALS = [
    (401, "does not accept your token", "hf auth login"),
    (403, "403|does not accept your token", "write"),
    (409, "409|changed by somebody|does not say", "same again"),
    (500, "cannot do it now .it answers 500.", "same again"),
]


@pytest.mark.parametrize(("status", "what", "hint"), REFUSALS)
def test_a_refusal_at_any_request_is_two_lines(
    tmp_path: Path, push_hub: PushHub, status: int, what: str, hint: str
) -> None:
    folder = an_export(tmp_path / "hf")
    total, ended = requests_of_a_push(push_hub, folder), 0
    for at in range(1, total + 1):
        push_hub.repos.clear(), push_hub.store.clear(), push_hub.received.clear()

        def refuse(number: int, handler: Any, at: int = at) -> bool:
            if number >= at:
                handler.reply(status, {"error": f"see {TOKEN}"}, X_Error_Message=TOKEN)
            return number >= at

        push_hub.before = refuse
        with pytest.raises(ExportError) as error:
            push(folder)
        assert TOKEN not in f"{error.value.what} {error.value.hint}" and "\n" not in error.value.what
        ended += bool(re.search(what, error.value.what)) and hint in error.value.hint
    assert ended >= 5  # at the store's own requests it is the store that refuses


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"id": 1, "files": [{"path": 1}]}'])
def test_an_answer_that_is_none_is_two_lines(tmp_path: Path, push_hub: PushHub, body: bytes) -> None:
    folder = an_export(tmp_path / "hf")
    total = requests_of_a_push(push_hub, folder)
    for at in range(1, total + 1):
        push_hub.repos.clear(), push_hub.store.clear(), push_hub.received.clear()

        def odd(number: int, handler: Any, at: int = at) -> bool:
            if number == at:
                handler.reply(200, body)
            return number == at

        push_hub.before = odd
        try:
            push(folder)
        except ExportError as error:
            known = (
                "hub's answer",
                "made, and is not there",
                "has not arrived as it was sent",
                "the hub's store refuses it",
            )
            assert any(words in error.what for words in known), at


def test_nothing_of_others_is_replaced_unasked(tmp_path: Path, push_hub: PushHub) -> None:
    folder = an_export(tmp_path / "hf")
    repo = push_hub.repos[f"{USER}/support"] = Repo(
        files={".gitattributes": b"", "config.json": b"{}", "own.txt": b"mine"}
    )
    with pytest.raises(ExportError, match=r"holds 2 files that no push of qlora made.*config.json, own.txt") as error:
        push(folder)
    assert "`yes`" in error.value.hint and len(repo.commits) == 1
    asked: list[str] = []
    with pytest.raises(ExportError, match="you did not agree"):
        push(folder, ask=lambda question: bool(asked.append(question)))
    assert len(repo.commits) == 1 and "replaced" in asked[0]
    push(folder, ask=lambda _: True)
    assert repo.files["own.txt"] == b"mine" and repo.files["config.json"] == (folder / "config.json").read_bytes()
    # It asks again for what is still somebody's, and for what was changed on the hub; not for what a push has made.
    with pytest.raises(ExportError, match=r"holds 1 files .*\(own.txt\)"):
        push(folder)
    del repo.files["own.txt"]
    push(folder)
    repo.files["README.md"] = b"written on the hub"
    with pytest.raises(ExportError, match=r"holds 1 files .*\(README.md\)"):
        push(folder)


def test_what_an_earlier_push_made_gives_way(tmp_path: Path, push_hub: PushHub) -> None:
    push(an_export(tmp_path / "one", old__json=b'{"a": 1}'))
    repo = push_hub.repos[f"{USER}/support"]
    assert "old.json" in repo.files
    push(an_export(tmp_path / "two", new__json=b'{"b": 2}'))
    assert "old.json" not in repo.files and "new.json" in repo.files and len(repo.commits) == 3


def test_another_model_of_ours_is_not_replaced_unasked(tmp_path: Path, push_hub: PushHub) -> None:
    hf, gguf = an_export(tmp_path / "hf"), an_export(tmp_path / "gguf", "gguf-q8_0")
    push(hf)
    repo = push_hub.repos[f"{USER}/support"]
    with pytest.raises(ExportError, match="holds hf of an earlier push, which a push of gguf-q8_0 alone takes out"):
        push(gguf)
    other = an_export(tmp_path / "other", of="lamps")
    with pytest.raises(ExportError, match="holds hf of another run or adapter, pushed earlier") as error:
        push(other)
    assert "name another repository" in error.value.hint and len(repo.commits) == 2
    assert b"lamps" not in push_hub.everything() and b'"support"' not in repo.files["manifest.json"]  # type: ignore[operator]
    sink = Recorder()
    push(gguf, ask=lambda _: True, sink=sink)
    assert "hf-1.safetensors" not in repo.files and "gguf-q8_0-1.safetensors" in repo.files
    assert any(isinstance(one, Notice) and "no longer in it" in one.message and one.count == 2 for one in sink.events)


def test_an_owner_is_spelled_as_the_hub_does(tmp_path: Path, push_hub: PushHub) -> None:
    assert push(an_export(tmp_path / "hf"), "OUR-Lab/x").repository == "our-lab/x"


def test_somebody_elses_commit_in_between_is_seen(tmp_path: Path, push_hub: PushHub) -> None:
    folder = an_export(tmp_path / "hf")

    def other(_number: int, handler: Any) -> bool:
        if "/commit/" in handler.path:
            push_hub.repos[f"{USER}/support"].commits.append("b" * 40)
        return False

    push_hub.before = other
    with pytest.raises(ExportError, match="was changed by somebody else at this moment"):
        push(folder)
    push_hub.before = lambda _number, _handler: False
    sent = push_hub.stored_bytes()
    push(folder)
    assert push_hub.stored_bytes() == sent
    destination = open_destination(Push("support"), Contents.of([PublishedFolder.open(folder)]))
    push_hub.repos[f"{USER}/support"].files["theirs.txt"] = b"x"
    with pytest.raises(ExportError, match="meanwhile"):
        destination.deliver([an_export(tmp_path / "b")], Recorder())


def test_public_is_asked_for_and_said_yes_to(tmp_path: Path, push_hub: PushHub) -> None:
    folder = an_export(tmp_path / "hf")
    with pytest.raises(ExportError, match="is public: everybody may read") as error:
        push(folder, public=True)
    assert "`yes`" in error.value.hint and not push_hub.repos
    with pytest.raises(ExportError, match="you did not agree"):
        push(folder, public=True, ask=lambda _: False)
    assert push(folder, public=True, ask=lambda _: True).public and not push_hub.repos[f"{USER}/support"].private
    with pytest.raises(ExportError, match="is there and public, and a push is private unless asked"):
        push(folder)
    push_hub.repos[f"{USER}/own"] = Repo(private=True)
    with pytest.raises(ExportError, match="is there and private, and a public one is asked for"):
        push(folder, "own", public=True, ask=lambda _: True)


def test_a_repository_that_the_hub_makes_public_gets_nothing(tmp_path: Path, push_hub: PushHub) -> None:
    def opened(_number: int, handler: Any) -> bool:
        for repo in push_hub.repos.values():
            repo.private = False
        return False

    push_hub.before = opened
    with pytest.raises(ExportError, match="is there and public"):
        push(an_export(tmp_path / "hf"))
    assert not push_hub.stored_bytes() and len(push_hub.repos[f"{USER}/support"].commits) == 1


def test_whose_name_it_is(tmp_path: Path, push_hub: PushHub) -> None:
    folder = an_export(tmp_path / "hf")
    with pytest.raises(ExportError, match=r"somebody is neither you .* nor an organization of yours"):
        push(folder, "somebody/model")
    push_hub.repos["somebody/model"] = Repo(private=True)
    with pytest.raises(ExportError, match=r"somebody/model: cannot be written to with your token \(403\)"):
        push(folder, "somebody/model")
    assert push(folder, "our-lab/model").repository == "our-lab/model"
    push_hub.role = "read"
    with pytest.raises(ExportError, match="your token for the hub may read only"):
        push(folder)
    push_hub.role = "fineGrained"  # whose rights are seen when they are used
    with pytest.raises(ExportError, match=r"nobody/model: cannot be made with your token \(403\)"):
        push(folder, "nobody/model")

    def unseen(_number: int, handler: Any) -> bool:
        if handler.command == "GET" and handler.path.startswith("/api/models/"):
            handler.reply(404, {}, X_Error_Code="RepoNotFound")
        return handler.command == "GET" and handler.path.startswith("/api/models/")

    push_hub.before = unseen
    with pytest.raises(ExportError, match="our-lab/model: is there, and your token may not see it"):
        push(folder, "our-lab/model")
    push_hub.before = lambda _number, _handler: False
    push_hub.ignored = ("config.json",)
    with pytest.raises(ExportError, match=r"its .gitignore leaves out config.json"):
        push(folder, "other")


def test_no_token_and_no_network_are_said_first(push_hub: PushHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE is set"):
        open_destination(Push("x"), NOTHING)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ExportError, match="there is no token") as error:
        open_destination(Push("x"), NOTHING)
    assert "hf auth login" in error.value.hint
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_\x1b[2J")
    with pytest.raises(ExportError, match="characters that no token has"):
        open_destination(Push("x"), NOTHING)
    with pytest.raises(ExportError, match="is no name of a repository"):
        open_destination(Push("a/b/c"), NOTHING)
    assert not push_hub.received
