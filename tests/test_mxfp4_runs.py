"""gpt-oss in MXFP4 from a recipe to a folder that plain transformers opens: its experts' bytes are never touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora import api
from qlora.events import Notice, Recorder
from qlora.model.load import load_base
from qlora.recipe.sections import QuantizationSection
from tests import runs
from tests.mixtures import tensor_hashes
from tests.model.base_cache.cases import aged
from tests.model.conftest import at
from tests.mxfp4 import STATED, make_base

PACKED = ("_blocks", "_scales")
STEPS = 4
SETTINGS = (
    *(f"train.max_steps={STEPS}", "train.learning_rate=2e-3", "train.batch_size=4", "train.warmup_ratio=0"),
    *("eval.samples=1", "data.eval_fraction=0.25", "data.max_length=96", "checkpoint.every_steps=1"),
)
MOST_KL = 0.15  # nats: attention in 16 bit beside the 4 bit that was trained on, of random weights at their widest


def plainly(folder: Path) -> Any:
    """By plain transformers, every weight at its place. Without kernels it dequantizes the experts."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def test_gpt_oss_in_mxfp4_is_trained_stopped_gone_on_with_and_merged(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    run_dir, sink, end = runs.straight_and_resumed(tmp_path, base, SETTINGS, STEPS)
    peak, weights = end.memory["peak"], end.memory["weights"]
    assert 0.9 * peak["measured"] <= peak["predicted"] <= 1.25 * peak["measured"]
    assert weights["measured"] <= weights["predicted"] <= 1.15 * weights["measured"]  # rounded up to 512 bytes each
    said = [event.message for event in sink.events if isinstance(event, Notice)]
    assert any("stay in MXFP4 as published" in message and "attention is in NF4" in message for message in said)
    exported = api.merge_and_export(run_dir, to="hf", merge_base="full", sink=Recorder())
    assert all(check[2] for check in exported.checks)
    assert next(line for line in exported.fidelity if line.name == "hf").kl <= MOST_KL
    before, after = tensor_hashes(base), tensor_hashes(exported.folder)
    assert before.keys() == after.keys()
    packed = [name for name in before if name.endswith(PACKED)]
    assert len(packed) == 8 and all(before[name] == after[name] for name in packed)
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["quantization_config"] == STATED
    adapted(run_dir, base, exported.folder)


def adapted(run_dir: Path, base: Path, folder: Path) -> None:
    """The merged folder is the base with the adapter, which plain peft opens, both by plain transformers."""
    from peft import PeftModel

    ids = torch.arange(4, 40)[None]
    tuned = PeftModel.from_pretrained(plainly(base).float(), run_dir / "adapter").eval()
    names = {name for name, _ in tuned.named_parameters() if ".lora_" in name}
    saved = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    assert len(names) == len(saved) > 0
    with torch.no_grad():
        merged, wanted = plainly(folder).float()(input_ids=ids).logits, tuned(input_ids=ids).logits
        untuned = plainly(base).float()(input_ids=ids).logits
        ours = load_base(at(folder), QuantizationSection(type="none"), "auto", torch.device("cpu"), Recorder())
        ours = ours.float()(input_ids=ids).logits
    assert (merged - wanted).norm() < 0.2 * (untuned - wanted).norm()  # attention is rounded to bf16 once more
    assert (ours - merged).norm() < 1e-5 * merged.norm()


def test_streamed_and_read_from_the_cache_it_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's bytes go through a layer's blob, of the host and of a kept base."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    base, found = aged(make_base(tmp_path / "base")), []
    ways = (("memory.cache=false",), ("memory.cache=true",), ("memory.cache=true", "memory.stream_weights=true"))
    for number, keys in enumerate(ways):
        recipe = runs.write_recipe(tmp_path / str(number), base)
        sink = runs.train(recipe, *SETTINGS, "train.max_steps=2", *keys)
        found.append(runs.hashes(recipe, 2))
        said = [event.message for event in sink.events if isinstance(event, Notice)]
        assert any("from the cache" in one for one in said) == (number == 2)
    assert found[0] == found[1] == found[2]


def test_experts_in_mxfp4_are_trained_and_merged_in_16_bit(tmp_path: Path) -> None:
    """Adapters on experts that stay in their published form: stopped and gone on with, opened by plain peft; written in
    16 bit with what was learned in them, and config.json says nothing of MXFP4."""
    base = make_base(tmp_path / "base", shards=2)
    settings = (*SETTINGS, "lora.experts=true", "lora.r=4")
    one, other = (runs.write_recipe(tmp_path / name, base) for name in ("straight", "stopped"))
    sink = runs.train(one, *settings)
    runs.train(other, *settings, stop_after=2)
    runs.train(other, *settings, mode="resume")
    assert runs.hashes(one, STEPS) == runs.hashes(other, STEPS)
    said = [event.message for event in sink.events if isinstance(event, Notice)]
    assert any("stay in MXFP4 as published" in message for message in said)
    assert any("adapters on the" in message and "of each of 4 projections" in message for message in said)
    run_dir = runs.run_dir(one)
    exported = api.merge_and_export(run_dir, to="hf", merge_base="full", sink=Recorder())
    assert all(check[2] for check in exported.checks)
    assert next(line for line in exported.fidelity if line.name == "hf").kl <= MOST_KL
    written: dict[str, torch.Tensor] = {}
    for file in exported.folder.glob("*.safetensors"):
        written |= load_file(file)
    assert not any(name.endswith(PACKED) for name in written)
    assert {written[name].dtype for name in written if name.endswith("experts.gate_up_proj")} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((exported.folder / "config.json").read_text())
    adapted(run_dir, base, exported.folder)
