"""Checkpoints: which are kept, what they say of themselves, and what is put back of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora import disk
from qlora.errors import RunFolderError
from qlora.events import Recorder
from qlora.model.identity import Fingerprints
from qlora.training import checkpoint
from qlora.training.checkpoint import RunState
from tests.runs import run_dir, train, write_recipe
from tests.training.cases import ABOUT, optimizer

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, RunState(step=2), optimizer(), Fingerprints("b", "d"), 2, ABOUT)
    return folder


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    train(recipe, "train.max_steps=5", "train.batch_size=2", "checkpoint.every_steps=1", "checkpoint.keep=2")
    names = sorted(path.name for path in (run_dir(recipe) / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000005"]


def test_the_manifest_tells_how_it_was_made(run: Path) -> None:
    manifest = disk.read_manifest(checkpoint.folder_of(run, 2))
    assert manifest["versions"] == ABOUT["versions"] and manifest["recipe_sha256"] == "ab" * 32
    assert set(manifest["files"]) == set(FILES)


def test_tensors_are_restored_bit_for_bit_or_not_at_all(run: Path) -> None:
    made = checkpoint.Checkpoint(checkpoint.folder_of(run, 2), RunState(step=2))
    first, second = optimizer(), optimizer()
    for master in second.masters.values():
        master.data.zero_()
    checkpoint.restore(made, second, Fingerprints("b", "d"))
    one, other = first.state(), second.state()
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    for wrong in (Fingerprints("x", "d"), Fingerprints("b", "x")):
        with pytest.raises(RunFolderError, match="was made with another"):
            checkpoint.restore(made, second, wrong)


def test_checkpoint_newest_needs_no_run(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, Recorder()) is None
