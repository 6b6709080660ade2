"""The kept log-probabilities of the reference: read where they are of this run, else asked for again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import disk
from qlora.errors import RunFolderError
from qlora.training import reference
from tests.runs import hashes, run_dir, train
from tests.training.preference_cases import ALL, notices, write_recipe


def rewritten(folder: Path, **changes: Any) -> None:
    """The kept reference with other numbers, or another key, under a manifest that fits."""
    about = {"kind": "reference", "key": changes.pop("key", disk.read_manifest(folder).get("key"))}
    found = {name: one + changes.get("more", 0.0) for name, one in load_file(folder / reference.FILE).items()}
    shutil.rmtree(folder)
    disk.publish_folder(folder, lambda place: save_file(found, place / reference.FILE), about)


def test_the_kept_reference_is_read_where_it_is_of_this_run(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama, "dpo")
    train(recipe, *ALL, stop_after=2)
    folder = run_dir(recipe) / reference.FOLDER
    was = load_file(folder / reference.FILE)
    rewritten(folder, more=50.0)  # what is there is what is compared with
    assert "read from" in notices(train(recipe, *ALL, mode="resume", stop_after=3), "reference")[0]
    rewritten(folder, key="another")
    again = train(recipe, *ALL, mode="resume", stop_after=4)
    assert "is not read (it is of another base" in notices(again, "reference")[0]
    now = load_file(folder / reference.FILE)
    assert all(torch.equal(now[name], was[name]) for name in was)
    (folder / reference.FILE).write_bytes(b"broken")
    again = train(recipe, *ALL, mode="resume", stop_after=5)
    assert "is not read" in notices(again, "reference")[0]
    shutil.rmtree(folder)
    train(recipe, *ALL, mode="resume", stop_after=6)
    now = load_file(folder / reference.FILE)
    assert all(torch.equal(now[name], was[name]) for name in was)


def test_a_disk_that_is_full_costs_the_copy_alone(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, place: Path) -> None:
        raise OSError(28, "No space left on device")

    straight, other = (write_recipe(tmp_path / name, llama, "dpo") for name in ("one", "two"))
    train(straight, *ALL)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "save_file", full)
        assert "cannot be written" in notices(train(other, *ALL, stop_after=3), "reference")[0]
    assert not (run_dir(other) / reference.FOLDER).exists()
    train(other, *ALL, mode="resume")
    assert hashes(other, 8) == hashes(straight, 8)


def test_a_run_that_goes_on_with_an_adapter_compares_with_that(tmp_path: Path, llama: Path) -> None:
    first = write_recipe(tmp_path / "first", llama, "dpo")
    train(first, *ALL)
    second = write_recipe(tmp_path / "second", llama, "dpo", name="on")
    second.write_text(second.read_text() + f'[lora]\nfrom = "{run_dir(first)}"\n')
    keys = [key for key in ALL if not key.startswith("lora.")]
    begun = train(second, *keys, stop_after=4)
    at_first = next(event.as_dict() for event in begun.of("preference"))
    assert abs(at_first["margin"]) < 0.05 and at_first["kl"] == pytest.approx(0, abs=1e-6)  # compared with itself
    assert [event.as_dict()["kl"] for event in begun.of("preference") if event.as_dict()["evaluated"]][-1] > 1e-6
    shutil.rmtree(run_dir(second) / reference.FOLDER)
    train(second, *keys, mode="resume")
    seldom = second.with_name("seldom.toml")  # asked where it began no more than at its ends
    seldom.write_text(second.read_text())
    train(seldom, *keys, "eval.every_steps=100")
    assert hashes(seldom, 8) == hashes(second, 8)
    assert (run_dir(second) / reference.FOLDER).is_dir()
    shutil.rmtree(run_dir(second) / reference.FOLDER)
    shutil.rmtree(run_dir(second) / "start")
    with pytest.raises(RunFolderError, match="is gone or changed"):
        train(second, *keys, mode="resume")
