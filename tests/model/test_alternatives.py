"""What is named instead of a base that is refused can be trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.model.alternatives import _MAKERS, LIKE, text_model_like
from qlora.model.base_folder import check_model_type
from qlora.model.resolve import resolve_config
from tests.all_families import DENSE

# The type of each model that is named, as its config.json says it.
TYPE_OF = {
    "Qwen/Qwen3": "qwen3",
    "meta-llama/Llama": "llama",
    "mistralai/Mistral": "mistral",
    "google/gemma-3-1b": "gemma3_text",
    "google/gemma-2": "gemma2",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen": "qwen2",
    "microsoft/": "phi3",
    "zai-org/GLM-4": "glm4",
    "ibm-granite/granite-3.3": "granite",
    "allenai/OLMo-2": "olmo2",
    "HuggingFaceTB/SmolLM2": "llama",
    "HuggingFaceTB/SmolLM3": "smollm3",
    "CohereLabs/": "cohere2",
}


def test_every_model_that_is_named_is_of_a_type_that_is_trained() -> None:
    for name in (name for sizes in LIKE.values() for name in sizes.values()):
        (kind,) = (kind for start, kind in TYPE_OF.items() if name.startswith(start))
        assert kind in DENSE, name
        check_model_type({"model_type": kind}, name)
    assert set(_MAKERS.values()) == set(LIKE)


@pytest.mark.parametrize(
    ("model_type", "name", "like"),
    [
        ("qwen3_vl", "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-8B"),
        ("qwen3_vl", "/bases/Qwen3-VL-2B-Instruct/", "Qwen/Qwen3-1.7B"),
        ("qwen3_moe", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-32B"),
        ("gpt_oss", "openai/gpt-oss-20b", "Qwen/Qwen3-14B"),
        ("mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("llama4", "meta-llama/Llama-4-Scout-17B-16E", "meta-llama/Llama-3.1-8B-Instruct"),
        ("deepseek_v3", "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
        (None, "Qwen/Qwen3-Coder-30B-A3B-Instruct", "Qwen/Qwen3-32B"),
        (None, "", "Qwen/Qwen3-8B"),
        ({"no": "text"}, "owner/name-4bit", "Qwen/Qwen3-8B"),
    ],
)
def test_the_same_makers_and_about_the_size(model_type: object, name: str, like: str) -> None:
    assert text_model_like(model_type, name) == like


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "qwen3_vl",
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "text_config": {"model_type": "qwen3_vl_text"},
        },
        {"model_type": "jetmoe", "architectures": ["JetMoeForCausalLM"], "num_hidden_layers": 2},
        {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "num_hidden_layers": 2},
        {"model_type": "t5", "is_encoder_decoder": True},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "of tomorrow"},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_every_kind_that_is_refused_leads_to_a_model(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is a mixture|is not|encoder-decoder") as refusal:
        resolve_config(str(tmp_path), "main", Recorder())
    assert any(name in refusal.value.hint for sizes in LIKE.values() for name in sizes.values()), refusal.value.hint
