"""The delivered folder `adapter/`: what it says of its run, and that it is written in one rename."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.events import Recorder
from qlora.model import adapters
from qlora.model.adapter_folder import PROVENANCE_FILE
from qlora.model.identity import at_the_door
from qlora.model.resolve import resolve
from qlora.model.tokenizer_files import read_files
from qlora.recipe.reading import recipe_of_base
from qlora.training.best_adapter import BestAdapter
from qlora.training.checkpoint import RunState
from qlora.version import __version__


@pytest.fixture
def best(llama: Path, monkeypatch: pytest.MonkeyPatch) -> BestAdapter:
    """With a model of which one byte is saved."""
    monkeypatch.setattr(adapters, "save", lambda model, folder, *_: (folder / "adapter_model.safetensors").touch())
    base = resolve(str(llama), "main", Recorder())
    identity, files = at_the_door(base.config, base.tensors), read_files(base.path)
    recipe = recipe_of_base(str(llama))
    return BestAdapter(None, base, files, recipe, train_rows=27, eval_rows=3, identity=identity)


def test_the_folder_is_the_adapter_its_tokenizer_and_its_papers(best: BestAdapter, tmp_path: Path) -> None:
    sink = Recorder()
    best.publish(tmp_path, RunState(step=7, train_loss=1.25), sink)
    folder = tmp_path / "adapter"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md", PROVENANCE_FILE} <= names
    written = json.loads((folder / PROVENANCE_FILE).read_text())
    assert written["step"] == 7 and written["base"] == str(best.base.path) and written["version"] == __version__
    assert written["fingerprint"] == best.base.fingerprint
    assert written["identity"] == best.identity.model_dump() and written["quantization"]["type"] == "nf4"
    (saved,) = sink.of("saved")
    assert saved.as_dict()["step"] == 7 and saved.as_dict()["path"] == str(folder) and saved.as_dict()["bytes"] > 0


def test_a_write_that_fails_leaves_the_adapter_before(best: BestAdapter, tmp_path: Path, monkeypatch: Any) -> None:
    best.publish(tmp_path, RunState(step=7), Recorder())
    sink = Recorder()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "save", full)
    with pytest.raises(OSError, match="No space"):
        best.publish(tmp_path, RunState(step=8), sink)
    assert json.loads((tmp_path / "adapter" / PROVENANCE_FILE).read_text())["step"] == 7
    assert not sink.events and [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_card_says_what_was_measured_and_what_was_not(best: BestAdapter) -> None:
    bare = best.card(RunState(step=7))
    assert "| training loss of the last step | not measured nats a token |" in bare
    assert "| evaluation loss | not measured (no evaluation rows) nats a token |" in bare and "exact match" not in bare
    full = best.card(RunState(step=7, eval_loss=0.5, exact_match_before=0.125, exact_match_after=0.75))
    assert "| training rows | 27 |" in full and "| evaluation loss | 0.5000 nats a token |" in full
    assert "| exact match | 12.5% before, 75.0% after |" in full
