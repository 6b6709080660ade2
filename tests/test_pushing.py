"""Exports that are there are pushed as they are; one that could not be sent is there all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora import api, disk, export_source
from qlora.errors import ExportError
from qlora.events import Notice, Recorder
from qlora.export.artifacts import Artifact
from qlora.export.push import Push, made_before
from qlora.pushing import are_exports, push_exports
from tests.export.cases import KINDS, trained
from tests.push_hub import MAIL, TOKEN, USER, PushHub, an_adapter, an_export, push_hub

__all__ = ["push_hub"]


def test_folders_and_files_in_them_are_pushed_together(tmp_path: Path, push_hub: PushHub) -> None:
    hf, gguf = an_export(tmp_path / "hf"), an_export(tmp_path / "gguf", "gguf-q8_0")
    assert are_exports([hf, gguf / "config.json"]) and not are_exports([hf, tmp_path]) and not are_exports(["nowhere"])
    pushed = push_exports([hf, gguf / "config.json", gguf], Push("support"))
    files = push_hub.repos[f"{USER}/support"].files
    assert {"hf-1.safetensors", "gguf-q8_0-1.safetensors"} <= files.keys() and pushed.files == len(files) - 1


def test_two_of_one_format_are_not_mixed_in_one_repository(tmp_path: Path, push_hub: PushHub) -> None:
    folders = [an_export(tmp_path / name, of=name, model__safetensors=name.encode()) for name in ("a", "b")]
    with pytest.raises(ExportError, match=f"2 are hf, and a repository holds one: {folders[0]}, {folders[1]}"):
        push_exports(folders, Push("support"))
    assert not push_hub.received


def test_nothing_is_asked_of_the_hub_for_what_is_no_export(tmp_path: Path, push_hub: PushHub) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(ExportError, match="is no export that could be pushed"):
            push_exports(place, Push("support"))
    assert not push_hub.received


def test_a_push_that_fails_says_that_the_export_is_there(tmp_path: Path, push_hub: PushHub) -> None:
    push_hub.before = lambda _number, handler: "/commit/" in handler.path and handler.break_off()
    folder = an_export(tmp_path / "hf")
    with pytest.raises(ExportError) as error:
        push_exports(folder, Push("support"))
    assert error.value.hint.endswith(f"; the export itself is done: {folder}") and "same again" in error.value.hint


def test_a_runs_adapter_is_pushed_as_it_lies(tmp_path: Path, push_hub: PushHub) -> None:
    folder = an_adapter(tmp_path / "runs" / "support" / "adapter", "owner/base", "c" * 40)
    report = api.merge_and_export(folder.parent, to="adapter", push=Push("lamps"))
    assert report.products == () and report.pushed.repository == f"{USER}/lamps"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= push_hub.repos[f"{USER}/lamps"].files.keys()
    with pytest.raises(ExportError, match="one adapter alone is not written again"):
        api.merge_and_export(folder.parent, to="adapter")
    with pytest.raises(ExportError, match="what was not verified is not pushed"):
        api.merge_and_export(folder.parent, options=api.export_options(verify=False), push=Push("lamps"))


def test_an_export_of_just_this_request_is_not_made_again(tmp_path: Path) -> None:
    folder, sink = an_export(tmp_path / "hf"), Recorder()
    artifact = Artifact("hf", folder)
    (made,) = made_before([artifact], "x", sink)
    assert (made.format, made.folder, made.tensors, made.merge_base) == ("hf", folder, 2, "nf4")
    assert made.bytes == sum(path.stat().st_size for path in folder.iterdir() if path.name != disk.MANIFEST)
    assert isinstance(sink.events[0], Notice) and "not made again" in sink.events[0].message
    assert made_before([artifact], "y", sink) == () == made_before([artifact, Artifact("b", tmp_path / "b")], "x", sink)
    weights = folder / "hf-2.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert made_before([artifact], "x", sink) == ()  # it is made again, and what was changed is set aside


@pytest.mark.slow
def test_a_real_export_is_pushed_resumed_and_names_nobody(
    tmp_path: Path, llama: Path, push_hub: PushHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "maria_owner_7"
    adapter = home / "adapters" / "lamps"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "maria_owner_7")
    trained(llama, adapter, KINDS["plain"])
    settings: dict[str, Any] = {"to": ["hf", "gguf"], "quants": ["f16"], "push": Push("lamps")}
    push_hub.before = lambda _number, handler: "/commit/" in handler.path and handler.break_off()
    with pytest.raises(ExportError, match="cannot be reached") as error:
        api.merge_and_export(adapter, **settings)
    assert "the export itself is done" in error.value.hint
    sent = push_hub.stored_bytes()
    push_hub.before = lambda _number, _handler: False
    monkeypatch.setattr(export_source, "produced", lambda *_: pytest.fail("it is there already"))
    report = api.merge_and_export(adapter, **settings)
    assert push_hub.stored_bytes() == sent and [one.format for one in report.products] == ["hf", "gguf-f16"]
    files = push_hub.repos[f"{USER}/lamps"].files
    assert {
        "model.safetensors",
        "lamps-F16.gguf",
        "config.json",
        "tokenizer.json",
        "Modelfile",
    } <= files.keys()
    arrived = push_hub.everything()
    for text in ("maria_owner_7", str(tmp_path), str(llama.parent), TOKEN, MAIL):
        assert text.encode() not in arrived, text


def test_the_names_that_an_export_and_its_push_have_are_one(tmp_path: Path, push_hub: PushHub) -> None:
    """A push is refused where the repository holds another run's model: the same one is not another to itself."""
    folder = an_adapter(tmp_path / "runs" / "support:v2" / "adapter", "owner/base", "c" * 40)
    for _ in range(2):
        api.merge_and_export(folder.parent, to="adapter", push=Push("lamps"))
        push_exports_of_adapter = api.merge_and_export(folder, to="adapter", push=Push("lamps"))
    assert push_exports_of_adapter.pushed.there_already == push_exports_of_adapter.pushed.files
