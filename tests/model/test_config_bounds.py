"""The numbers of a stranger's configuration, before transformers sees them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError
from qlora.model import config_bounds
from qlora.model.config_bounds import BOUNDS, check_config_values, check_generation_values, check_layers_exist

GOOD = {"model_type": "llama", "num_hidden_layers": 2, "rope_theta": 10_000_000_000, "pad_token_id": -1}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000; at most 1,024 layers"),
        ({"decoder_layers": 10**6}, "decoder_layers is 1,000,000; at most 1,024 layers"),
        ({"n_layer": 1025}, "n_layer is 1,025"),
        ({"text_config": {"model_type": "x", "num_layers": 10**9}}, "text_config.num_layers is"),
        ({"vision_config": {"depth": 10**9}}, "vision_config.depth is"),
        ({"audio_config": {"parts": [{"encoder_layers": 10**9}]}}, "audio_config.parts.encoder_layers is"),
        ({"num_experts": 10**6}, "num_experts is 1,000,000; at most 16,384 parts"),
        ({"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000; at most 4,194,304 tokens"),
        ({"hidden_size": -(10**9)}, "hidden_size is -1000000000, a model has at least 1"),
        ({"ffn_hidden_size": -(10**9)}, "ffn_hidden_size is -1,000,000,000; at most 1,048,576 values"),
        ({"max_position_embeddings": 10**12}, "at most 134,217,728 positions"),
        ({"rope_theta": 10**30}, "rope_theta is"),
        ({"eos_token_id": 1 << 31}, "eos_token_id is 2,147,483,648; at most 2,147,483,647 ids"),
        ({"eos_token_id": list(range(1025))}, "eos_token_id has 1,025 entries"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"pad_token_id": 1.5}, "pad_token_id is wrong"),
        ({"layer_types": ["a"] * 100_001}, "layer_types has 100,001 entries"),
        ({"id2label": {str(number): "x" for number in range(100_001)}}, "id2label has 100,001 entries"),
        ({"num_labels": 10**6}, "num_labels is 1,000,000; at most 100,000 labels"),
        ({"text_config": {"n_head": 0}}, "n_head is 0, a model has at least 1"),
        ({"\x1b[31m": {"num_layers": 10**6}}, r"\x1b[31m.num_layers is"),
        ({"layer_types": [7]}, "layer_types.0 is wrong"),
        ({"torch_dtype": "load"}, "torch_dtype is 'load', which is no type of weights"),
        ({"torch_dtype": 7}, "torch_dtype is wrong"),
        ({"tie_word_embeddings": "x" * 10**6}, "tie_word_embeddings is wrong"),
        ({"architectures": [7]}, "architectures"),
        ({"architectures": ["x"] * 101}, "architectures"),
        ({"model_type": "x" * 10**6}, "model_type is wrong"),
        ({"text_config": 7}, "text_config is wrong"),
        ({"quantization_config": 7}, "quantization_config"),
    ],
)
def test_what_no_model_has_is_refused_with_key_and_value(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as error:
        check_config_values({**GOOD, **keys}, "base: config.json")
    assert error.value.what.startswith("base: config.json: ")
    assert said in error.value.what and len(error.value.what) < 300


def test_what_models_have_passes() -> None:
    labels = {str(number): "x" for number in range(21_000)}
    check_config_values({**GOOD, "id2label": labels, "num_labels": 21_000, "time_step_limit": [0.0, float("inf")]}, "x")
    check_config_values({**GOOD, "eos_token_id": [1, 2], "dtype": "bfloat16", "torch_dtype": "torch.float16"}, "x")
    check_config_values({**GOOD, "hidden_size": 16384, "intermediate_size": [53248, 8], "num_hidden_layers": 126}, "x")
    check_config_values({**GOOD, "max_position_embeddings": 10_485_760, "sliding_window": None}, "x")
    check_generation_values({"eos_token_id": [1, 2], "temperature": 0.6}, "x")


def test_ids_of_generation_are_checked() -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        check_generation_values({"eos_token_id": {"a": 1}}, "generation_config.json")


def test_layers_without_tensors() -> None:
    for key in config_bounds.LAYER_COUNTS:
        with pytest.raises(ModelError, match="tells of 900 layers, but the weights are 20 tensors"):
            check_layers_exist({key: 900}, 20, "x")
    check_layers_exist({"num_hidden_layers": 2}, 20, "x")


def test_every_number_that_transformers_counts_with_is_bounded() -> None:
    """`range(config.KEY)` in the source of a causal model: a list or modules, one by one."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    models, found = Path(transformers.__file__).parent / "models", set()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for file in (models / model_type.replace("-", "_")).glob("*.py"):
            if file.name.startswith(("modeling_", "configuration_")):
                text = file.read_text(encoding="utf-8")
                found |= set(re.findall(r"(?<!torch\.a)\brange\((?:self\.)?config\.([a-z_0-9]+)\)", text))
    assert len(found) > 5 and "num_hidden_layers" in found
    bounds = {key: next(bound.most for bound in BOUNDS if bound.names.search(key)) for key in found}
    assert [key for key, most in bounds.items() if most > config_bounds.MAX_PARTS] == []
