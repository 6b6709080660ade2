"""What a simulated model is made of: the run's own decisions, or those of a new run on such a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora import numerics
from qlora.memory.baselines import BASELINES
from qlora.memory.hardware import Machine, asked_for
from qlora.memory.simulation import ModelSpec
from qlora.memory.spec import spec_of
from qlora.model.meta_model import text_config
from qlora.model.tensors import load_json
from qlora.model.weight_receiving import Place
from qlora.recipe.reading import load_recipe
from tests.floors import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart"
STREAMED = {"memory.stream_weights": "true", "train.gradient_checkpointing": "true"}


def spec(card: str | None, baseline: str = "qlora", **changes: object) -> ModelSpec:
    recipe = load_recipe(Path(f"{QUICKSTART}.toml"), [f"{key}={value}" for key, value in changes.items()])
    text, _ = text_config(load_json(QUICKSTART / "base" / "config.json"), "quickstart")
    machine = asked_for(card, None, "auto") if card else Machine("cpu", 8 << 30, "RAM available")
    return spec_of(text, "quickstart", machine, BASELINES[baseline], recipe)


def test_a_new_run_decides_by_the_machine() -> None:
    cpu = spec(None)
    assert (cpu.kernel, cpu.functions, cpu.loss_chunk, cpu.dtype) == ("one by one", None, None, torch.bfloat16)
    assert spec("RTX 3060 12GB").kernel is not None and spec("RTX 3060 12GB").dtype == torch.bfloat16
    assert spec("T4").dtype == torch.float16
    assert spec("RTX 3060 12GB", **STREAMED).place == Place(streams=True)


def test_the_run_under_way_has_decided() -> None:
    with numerics.in_force(numerics.Numerics(functions="peft", loss_chunk=64, dtype="fp16")):
        found = spec("RTX 3060 12GB")
    assert (found.functions, found.loss_chunk, found.dtype) == ("peft", 64, torch.float16)


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"qlora"}))
def test_another_stack_is_none_of_ours(name: str) -> None:
    with numerics.in_force(numerics.Numerics(functions="peft", loss_chunk=64, dtype="fp16")):
        found = spec("T4", name, **STREAMED)
    assert (found.kernel, found.functions, found.loss_chunk) == (None, None, None)
    assert found.place == Place() and found.dtype == torch.bfloat16
