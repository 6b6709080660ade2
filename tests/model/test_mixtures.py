"""What is an expert and what a router, and which mixtures are refused by their config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.model.meta_model import build_unmatched, linear_layers
from qlora.model.mixtures import experts_and_routers, experts_in, refuse_mixture, routers_in
from qlora.model.resolve import resolve_config
from tests import mixtures
from tests.all_families import MIXTURES, make_base, make_config

# Each way in which a count is written, of families whose experts are computed by code of their own.
SAMPLE = {
    "dbrx": "4 experts (moe_num_experts)",
    "jetmoe": "8 experts (num_local_experts)",
    "llama4_text": "16 experts (num_local_experts)",
    "longcat_flash": "512 experts (n_routed_experts)",
}
# Of the defaults of these, transformers itself builds no model.
NO_MODEL = ("dots1", "hunyuan_v1_moe", "lfm2_moe")
DENSE = [
    ("jamba", {}),
    ("granitemoehybrid", {}),
    ("nemotron_h", {}),
    ("doge", {}),
    ("gemma4_text", {}),
]


def said(config: Any, **more: Any) -> str:
    with pytest.raises(ModelError) as refusal:
        refuse_mixture({**config.to_dict(), **more}, "base")
    assert "use another model, such as" in refusal.value.hint and "\n" not in refusal.value.what
    return refusal.value.what


@pytest.mark.parametrize(("family", "count"), SAMPLE.items())
def test_experts_in_code_of_their_own_are_refused_by_name_and_count(family: str, count: str) -> None:
    assert said(make_config(family)).startswith(f"base: {family} is a mixture of {count}, ")


@pytest.mark.every
@pytest.mark.parametrize("family", [family for family in MIXTURES if family not in (*SAMPLE, *NO_MODEL)])
def test_every_other_mixture_is_taken(family: str) -> None:
    refuse_mixture(make_config(family).to_dict(), "base")


@pytest.mark.parametrize(("family", "overrides"), DENSE)
def test_dense_models_that_say_something_of_experts_are_not(family: str, overrides: dict[str, Any]) -> None:
    config = make_config(family, overrides)
    refuse_mixture({**config.to_dict(), "quantization_config": {"load_in_4bit": True}}, "base")
    assert not list(experts_and_routers(build_unmatched(config, "eager", "base")))


def test_a_mixture_stored_in_4_bit_is_refused_by_its_configuration(tmp_path: Path) -> None:
    """bitsandbytes keeps its experts in a form of its own, which no layer of ours reads."""
    folder = make_base("qwen3_moe", tmp_path / "base")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ModelError, match=r"qwen3_moe is a mixture of 128 experts .* stored in 4 bit"):
        resolve_config(str(folder), "main", Recorder())


def test_a_mixture_that_another_tool_has_quantized_is_refused_with_its_original(tmp_path: Path) -> None:
    """gpt-oss' own MXFP4 is taken as it is."""
    folder = make_base("qwen3_moe", tmp_path / "gpt-oss-20b")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ModelError, match=r"already quantized \(mxfp4\)") as refusal:
        resolve_config(str(folder), "main", Recorder())
    assert "gpt-oss-20b-BF16" in refusal.value.hint


@pytest.mark.parametrize("family", mixtures.FAMILIES)
def test_routers_are_never_linear_layers_to_quantize_or_adapt(family: str) -> None:
    """Nor what weighs a shared expert; all other layers of two dimensions in the trunk are."""
    model = build_unmatched(mixtures.make_config(family), "eager", "base")
    experts, routers = [name for name, _ in experts_in(model)], routers_in(model)
    assert experts and routers
    linear = {name for name, _ in linear_layers(model)}
    outputs = {
        name: module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and name not in linear
    }
    number = model.config.get_text_config().to_dict()
    counts = {1, *(value for key, value in number.items() if "experts" in key and isinstance(value, int))}
    kept = model._linear_use.kept
    assert all(out in counts for name, out in outputs.items() if name not in kept), outputs
    assert not linear & routers and not any("expert_gate" in name or ".router" in name for name in linear)
