"""A mixture of experts is known by its config.json, whatever its type calls them; what has no experts is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.model.mixtures import refuse_mixture
from qlora.model.resolve import resolve_config
from tests.all_families import MIXTURES, make_base, make_config

# Each way in which a count is written: several names, in a part, in no key at all but the class's default.
SAMPLE = {
    "glm4_moe": "128 experts (n_routed_experts)",
    "deepseek_v2": "64 experts (n_routed_experts)",
    "dbrx": "4 experts (moe_num_experts)",
    "dots1": "experts",
    "mixtral": "8 experts (num_local_experts)",
    "llama4_text": "16 experts (num_local_experts)",
}
DENSE = [
    ("jamba", {}),
    ("granitemoehybrid", {}),
    ("nemotron_h", {}),
    ("doge", {}),
    ("gemma4_text", {}),
]


def said(config: Any) -> str:
    with pytest.raises(ModelError) as refusal:
        refuse_mixture(config.to_dict(), "base")
    assert "dense model" in refusal.value.hint
    return refusal.value.what


@pytest.mark.parametrize(("family", "count"), SAMPLE.items())
def test_a_mixture_is_refused_by_its_name_and_count(family: str, count: str) -> None:
    assert said(make_config(family)) == f"base: {family} is a mixture of {count}, which cannot be held in 4 bit yet"


@pytest.mark.slow
@pytest.mark.parametrize("family", MIXTURES)
def test_every_mixture_is_refused(family: str) -> None:
    assert "is a mixture of" in said(make_config(family))


@pytest.mark.parametrize(("family", "overrides"), DENSE)
def test_dense_models_that_say_something_of_experts_are_not(family: str, overrides: dict[str, Any]) -> None:
    refuse_mixture(make_config(family, overrides).to_dict(), "base")


def test_a_deepseek_whose_layers_are_all_dense_is_not() -> None:
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 384}
    one = AutoConfig.for_model("deepseek_v3", **sizes, **latent, **heads, first_k_dense_replace=2)
    refuse_mixture(one.to_dict(), "base")
    assert "is a mixture of 256 experts" in said(
        AutoConfig.for_model("deepseek_v3", **sizes, **latent, **heads, first_k_dense_replace=1)
    )


def test_its_configuration_is_enough(tmp_path: Path) -> None:
    """The folder has no weights at all."""
    folder = make_base("qwen3_moe", tmp_path / "base")
    with pytest.raises(ModelError, match="qwen3_moe is a mixture of 128 experts"):
        resolve_config(str(folder), "main", Recorder())


def test_a_quantized_mixture_is_told_so_before_its_16_bit_copy_is_recommended(tmp_path: Path) -> None:
    folder = make_base("gpt_oss", tmp_path / "base")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ModelError, match="gpt_oss is a mixture of 128 experts"):
        resolve_config(str(folder), "main", Recorder())
