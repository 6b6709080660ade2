"""From a recipe to a job: what is cheap to find wrong is found first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora import api, device
from qlora.errors import DataError, ExportError, HardwareError, ModelError, RecipeError, TokenizerError
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe, recipe_of_base
from qlora.training import setup
from tests.families import make_base
from tests.runs import train, write_recipe, write_rows


def test_a_base_that_cannot_become_gguf_is_told_before_training(tmp_path: Path, llama: Path) -> None:
    base = make_base("apertus", tmp_path / "apertus")
    recipe = write_recipe(tmp_path, base)
    recorder = train(recipe, "train.max_steps=1")
    notices = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert any("cannot be exported as GGUF: 'apertus' models" in message for message in notices)
    with pytest.raises(ExportError, match="apertus"):
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


def test_a_gpu_that_is_too_old_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "trains", lambda _: False)
    monkeypatch.setattr(device, "name_of", lambda _: "GTX 980")
    with pytest.raises(HardwareError, match="GTX 980: older than the GPUs") as caught:
        setup.pick_device()
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint


def test_a_token_without_an_embedding_is_named_before_a_weight_is_read(tmp_path: Path, llama: Path) -> None:
    """A tokenizer may know more tokens than its base: they are refused only where a row has one."""
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    embedded = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<extra{number}>" for number in range(embedded - len(tokenizer) + 2)])
    tokenizer.save_pretrained(base)
    recipe = write_recipe(tmp_path, base)
    api.check(load_recipe(recipe))
    last = f"<extra{embedded - len(AutoTokenizer.from_pretrained(llama, trust_remote_code=False)) + 1}>"
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": last}]}))
    with pytest.raises(
        TokenizerError, match=rf"rows.jsonl:\d+: the token '{last}' \({embedded + 1}\) has no embedding"
    ):
        api.check(load_recipe(recipe))
