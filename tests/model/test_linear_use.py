"""Layers whose weight a model reads by itself keep their form; a layer that is called and nothing else does not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.memory.simulate import META
from qlora.model import adapters, linear_use
from qlora.model.load import load_base
from qlora.model.made_up import load_nothing
from qlora.model.meta_model import build_unmatched, check_layers, choose_attention, linear_layers
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.all_families import make_base, make_config

CPU = torch.device("cpu")
KEPT = [
    ("llama", {}),
    ("bloom", {}),  # reads slices of weights where it computes as pretraining did: nobody asks for it
    ("opt", {}),  # calls its decoder past its trunk
    ("gemma3n_text", {"correction_coefs": 4, "prediction_coefs": 4}),
    ("jamba", {"dt_proj": 2}),
    ("mamba", {"dt_proj": 4, "out_proj": 4, "x_proj": 4}),
    ("falcon_h1", {"out_proj": 4}),
    ("nemotron_h", {"out_proj": 1}),
    ("bamba", {"out_proj": 2}),
    ("rwkv", {"output": 4, "value": 4}),
    ("zamba", {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 2, "up_proj": 2, "down_proj": 2}),
]


def meta_model(config: Any) -> Any:
    return build_unmatched(config, choose_attention(config, "auto", "tiny"), "tiny")


def all_linear(model: Any) -> dict[str, torch.nn.Module]:
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not head
    }


@pytest.mark.parametrize(("family", "kept"), KEPT)
def test_what_is_kept(family: str, kept: dict[str, int]) -> None:
    model = meta_model(make_config(family))
    layers = all_linear(model)
    found = linear_use.use_of(model, layers)
    assert Counter(name.rpartition(".")[2] for name in found.kept) == kept and not found.trunk
    assert {name for name, _ in linear_layers(model)} == layers.keys() - found.kept
    assert all(type(layer) is torch.nn.Linear for layer in layers.values()), "a watch was left behind"
    assert not any(buffer.is_meta for buffer in model.buffers()), "a buffer was left behind"


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_nothing_of_the_watched_pass_stays_in_the_model(kind: str) -> None:
    """Rotary modules give themselves other frequencies during a pass, on the device of the pass."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 4}
    rope = {"rope_type": kind, "rope_theta": 10000.0, **(factors if kind == "longrope" else {"factor": 4.0})}
    config = make_config("phi3" if kind == "longrope" else "llama", {"rope_parameters": rope})
    model = meta_model(config)
    before = [(sorted(vars(module)), sorted(module._buffers)) for module in model.modules()]
    check_layers(model, "tiny")
    del model._linear_use
    assert [(sorted(vars(module)), sorted(module._buffers)) for module in model.modules()] == before
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_the_source_alone_knows_what_is_read_where_the_pass_cannot_be_watched(tmp_path: Path) -> None:
    """With weights in place nothing is computed: a fused kernel's branch stands in the source."""
    from tests.families import make_model

    model = make_model(make_config("mamba"))
    kept = linear_use.use_of(model, all_linear(model)).kept
    assert Counter(name.rpartition(".")[2] for name in kept) == {"dt_proj": 4, "out_proj": 4, "x_proj": 4}


@pytest.fixture(scope="module")
def jamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("jamba", tmp_path_factory.mktemp("jamba") / "base")


def test_kept_layers_are_loaded_in_16_bit_take_no_adapter_and_are_named(jamba: Path) -> None:
    sink = Recorder()
    model = load_base(resolve(str(jamba), "main", sink), QuantizationSection(), "auto", CPU, sink)
    layer = model.get_submodule("model.layers.0.mamba.dt_proj")
    assert type(layer) is torch.nn.Linear and layer.weight.dtype == torch.bfloat16
    assert type(model.get_submodule("model.layers.0.mamba.in_proj")).__name__ == "Linear4bit"
    told = [event.as_dict() for event in sink.of("notice") if "by itself" in event.as_dict()["message"]]
    assert [(line["count"], line["message"].endswith(": 2 dt_proj")) for line in told] == [(2, True)]
    trained = adapters.trainable(adapters.attach(model, LoraSection(), 0))
    assert any("mamba.in_proj.lora_A" in name for name in trained) and not any("dt_proj" in name for name in trained)


def test_the_estimator_has_them_in_16_bit_too(jamba: Path) -> None:
    model = meta_model(make_config("jamba"))
    load_nothing(model, QuantizationSection())
    weight = model.get_submodule("model.layers.0.mamba.dt_proj").weight
    assert (weight.dtype, weight.device) == (torch.bfloat16, META)


def test_a_name_that_means_kept_layers_alone_is_refused_and_one_of_both_kinds_means_the_others() -> None:
    model = meta_model(make_config("jamba"))
    with pytest.raises(ModelError) as refusal:
        adapters.attach(model, LoraSection(target_modules=("dt_proj", "in_proj")), 0)
    assert "reads or shares dt_proj by itself" in refusal.value.what and "in_proj" in refusal.value.hint
    model = meta_model(make_config("rwkv"))
    trained = adapters.trainable(adapters.attach(model, LoraSection(target_modules=("value", "receptance")), 0))
    adapted = {".".join(name.partition(".lora_")[0].split(".")[-2:]) for name in trained}
    assert adapted == {
        *("attention.receptance", "feed_forward.receptance"),
        "attention.value",  # that of the feed forward is rescaled by the model
    }


def test_a_trunk_that_is_not_apart_from_its_head_is_refused_by_name() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 384}
    config = AutoConfig.for_model("llama4_text", **sizes, **heads, moe_layers=[], pad_token_id=0)
    with pytest.raises(ModelError, match="Llama4ForCausalLM cannot be trained here: it has no trunk apart"):
        check_layers(meta_model(config), "tiny")
