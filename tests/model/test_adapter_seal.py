"""An adapter is what was published, or is refused by the name of the file that is not; cards may be edited."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora import disk
from qlora.errors import ExportError, UserError
from qlora.events import Recorder
from qlora.model import adapter_seal
from qlora.model.adapter_seal import SEALED, damage, seal

CONTENT = {name: f"content of {name}" for name in (*SEALED, "README.md", "NOTES.md")}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    def write(folder: Path) -> None:
        for name, text in CONTENT.items():
            (folder / name).write_text(text)
        save_file({"a": torch.zeros(8)}, folder / "adapter_model.safetensors")

    disk.publish_folder(tmp_path / "adapter", write)
    return tmp_path / "adapter"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_what_is_as_published_passes_in_silence(adapter: Path) -> None:
    sink = Recorder()
    assert set(seal(adapter, sink).found) == set(SEALED) and not sink.events and damage(adapter) is None


@pytest.mark.parametrize("name", [*SEALED, disk.MANIFEST])
def test_one_bit_of_each_file_is_seen_and_named_with_both_ways_out(adapter: Path, name: str) -> None:
    flip(adapter / name)
    with pytest.raises(ExportError) as refused:
        seal(adapter, Recorder())
    assert refused.value.what.startswith(f"{adapter / name}: ") and refused.value.what == damage(adapter)
    assert "put the file back" in refused.value.hint and f"remove {disk.MANIFEST}" in refused.value.hint


@pytest.mark.parametrize("name", SEALED)
def test_a_file_that_was_taken_away_is_seen(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    assert f"{name}: is missing" in str(damage(adapter))


def test_a_file_that_was_added_to_the_tokenizer_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    disk.publish_folder(folder, lambda place: [(place / name).write_text("x") for name in SEALED[:3]] and None)
    (folder / "my-notes.txt").write_text("mine")
    assert damage(folder) is None
    (folder / "chat_template.jinja").write_text("{{ another }}")
    assert "chat_template.jinja: was added" in str(damage(folder))


def test_edited_papers_are_a_notice(adapter: Path) -> None:
    sink = Recorder()
    (adapter / "README.md").write_text("my own words")
    (adapter / "NOTES.md").unlink()
    seal(adapter, sink)
    (notice,) = sink.of("notice")
    assert "NOTES.md, README.md in" in notice.as_dict()["message"] and notice.as_dict()["count"] == 2


def test_made_elsewhere_passes_and_ours_without_its_manifest_is_said(adapter: Path) -> None:
    (adapter / disk.MANIFEST).unlink()
    sink = Recorder()
    seal(adapter, sink)
    assert "is not known" in sink.of("notice")[0].as_dict()["message"]
    (adapter / "qlora.json").unlink()
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[:-1] + b"\1")
    for text in (None, json.dumps({"name": "a web app", "icons": []}), "no JSON", "[" * 100):
        if text is not None:
            (adapter / disk.MANIFEST).write_text(text)
        sink = Recorder()
        seal(adapter, sink)
        assert not sink.events


@pytest.mark.parametrize("name", SEALED)
def test_what_is_swapped_in_after_the_check_is_caught(adapter: Path, name: str) -> None:
    sealed = seal(adapter, Recorder())
    sealed.check()
    flip(adapter / name)
    with pytest.raises(ExportError, match=f"{name}: was replaced while it was being exported"):
        sealed.check()


def test_a_link_is_no_file_of_an_adapter(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(CONTENT["adapter_config.json"])
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="link out of the folder"):
        seal(adapter, Recorder())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "qlora.json", "README.md"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_file_of_another_size_is_not_read(
    adapter: Path, name: str, manifest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file of 64 GiB takes no room, and minutes to hash."""
    hashed: list[int] = []
    real = hashlib.file_digest

    def watched(file: Any, algorithm: str) -> Any:
        hashed.append(os.fstat(file.fileno()).st_size)
        assert hashed[-1] < 1000
        return real(file, algorithm)

    monkeypatch.setattr(adapter_seal.hashlib, "file_digest", watched)
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    if not manifest:
        (adapter / disk.MANIFEST).unlink()
    os.truncate(adapter / name, 64 << 30)
    with pytest.raises(UserError) if name != "README.md" or manifest else nullcontext():
        seal(adapter, Recorder())
