"""What is exported, opened: one adapter, or several of one base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ExportError, ModelError
from qlora.events import Recorder
from qlora.export.cards import file_name
from qlora.export.combination import Combination
from qlora.export_source import adapters_of, hash_of_request
from qlora.recipe.sections import QuantizationSection
from tests.export.cases import KINDS, edit, exported, of_peft, trained
from tests.families import make_base

PLAIN = QuantizationSection(type="none")


def test_adapters_of_two_bases_are_refused(tmp_path: Path, llama: Path) -> None:
    other = make_base("llama", tmp_path / "other", seed=5)
    trained(llama, tmp_path / "a", KINDS["plain"], PLAIN)
    trained(other, tmp_path / "b", KINDS["plain"], PLAIN)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, base in zip(folders, (llama, other), strict=True):
        edit(folder / "qlora.json", identity=identity_of(base))
    with pytest.raises(ExportError, match=r"b: was trained on another base than the first adapter: its weights differ"):
        exported(folders, combine=Combination((0.5, 0.5)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExportError, match="2 adapters are named, and no `weights`"):
        exported(folders, out=tmp_path / "out")
    with pytest.raises(ExportError, match="one adapter alone is not written again"):
        exported(folders[0], to="adapter", out=tmp_path / "out")


def identity_of(base: Path) -> dict[str, Any]:
    from qlora.model import identity
    from qlora.model.meta_model import build, taken_tensors
    from qlora.model.resolve import resolve

    found = resolve(str(base), "main", Recorder())
    known: dict[str, Any] = identity.read_through(
        found.config, taken_tensors(found, build(found)), Recorder()
    ).model_dump()
    return known


def test_several_lie_beside_the_first_under_all_their_names(tmp_path: Path, llama: Path) -> None:
    for name in ("a", "b"):
        of_peft(llama, tmp_path / name)
    folders, default = adapters_of([tmp_path / "a", tmp_path / "b"], Combination((0.5, 0.5)), "hf")
    assert folders == [tmp_path / "a", tmp_path / "b"] and default == tmp_path / "a-and-b-export"
    assert adapters_of([tmp_path / "a"], None, ["hf", "gguf"]) == ([tmp_path / "a"], tmp_path / "a-export")


def test_many_long_names_are_one_that_fits_and_is_their_own(tmp_path: Path, llama: Path) -> None:
    ends = ("one", "two", "two")
    defaults = set()
    for number, end in enumerate(ends):
        folders = [tmp_path / str(number) / f"{'дом' * 30}{at}-{end}" for at in range(4)]
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text("{}")
        _, default = adapters_of(folders, Combination((0.25,) * 4), "hf")
        hidden = default / ".gguf-q4_k_m.part"
        hidden.mkdir(parents=True)  # every name that an export makes of it
        assert len(os.fsencode(default.name)) <= 200 and default.name.endswith("-export") and "дом" in default.name
        defaults.add(default.name)
    assert len(defaults) == 2
    assert len(file_name("дом" * 80).encode()) <= 200


def test_a_request_is_known_by_what_it_is_made_of(tmp_path: Path, llama: Path) -> None:
    of_peft(llama, tmp_path / "a")
    one = hash_of_request([tmp_path / "a"], None, "hf")
    assert one == hash_of_request([tmp_path / "a"], None, "hf") != hash_of_request([tmp_path / "a"], None, "gguf")
    (tmp_path / "a" / "README.md").write_text("for people")
    assert one == hash_of_request([tmp_path / "a"], None, "hf")
    edit(tmp_path / "a" / "adapter_config.json", lora_alpha=7)
    assert one != hash_of_request([tmp_path / "a"], None, "hf")
    with open(tmp_path / "a" / "adapter_model.safetensors", "ab") as file:
        file.truncate(1 << 40)  # it would take an hour to read
    with pytest.raises(ModelError, match="no tensor owns"):
        hash_of_request([tmp_path / "a"], None, "hf")
