"""From a recipe to a job: what is cheap to find wrong is found first."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import device
from qlora.errors import DataError, ExportError, HardwareError, ModelError, RecipeError
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe, recipe_of_base
from qlora.training import setup
from tests.families import make_base
from tests.runs import train, write_recipe, write_rows


def test_a_base_that_cannot_become_gguf_is_told_before_training(tmp_path: Path, llama: Path) -> None:
    base = make_base("granite", tmp_path / "granite")
    recipe = write_recipe(tmp_path, base)
    recorder = train(recipe, "train.max_steps=1")
    notices = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert any("cannot be exported as GGUF: 'granite' models" in message for message in notices)
    with pytest.raises(ExportError, match="granite"):
        train(recipe, "train.max_steps=1", 'export.formats=["gguf:q8_0"]', mode="fresh")


def test_a_recipe_without_rows_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no training rows: there is no \[\[data.train\]\]"):
        setup.preflight(recipe_of_base("owner/never-asked-for"), Recorder())


def test_rows_are_looked_at_before_the_base(tmp_path: Path) -> None:
    """Neither is there: no hub is asked for a base whose rows are not there."""
    recipe = load_recipe(write_recipe(tmp_path, tmp_path / "nowhere"))
    rows = tmp_path / "rows.jsonl"
    rows.unlink()
    with pytest.raises(DataError, match="no such file"):
        setup.preflight(recipe, Recorder())
    write_rows(rows)
    with pytest.raises(ModelError, match="there is no folder"):
        setup.preflight(recipe, Recorder())


def test_a_gpu_without_bf16_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "computes_bf16", lambda _: False)
    monkeypatch.setattr(device, "name_of", lambda _: "GTX 1080")
    with pytest.raises(HardwareError, match="GTX 1080: computes no bf16") as caught:
        setup.pick_device()
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint
