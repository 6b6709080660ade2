"""A streamed base is the base: logits, buffers and 4-bit codes equal those of transformers, however it is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ModelError
from qlora.events import Notice, Progress, Recorder
from qlora.model.base_folder import BaseFolder
from qlora.model.load import load_base
from qlora.model.meta_model import build, linear_layers
from qlora.model.nf4 import is_stored_4bit
from qlora.model.resolve import resolve
from qlora.model.tensors import read_tensor
from qlora.recipe.sections import QuantizationSection
from tests.families import FAMILIES, make_base, make_config, make_tokenizer
from tests.model.conftest import CPU, load, logits, plain, stored_in_4bit

INPUT_IDS = torch.arange(5, 45)[None]
BaseOf = Callable[[str], BaseFolder]


def quantized_modules(base: BaseFolder) -> frozenset[str]:
    """The layers that are in 4 bit when `base` is loaded so, by their name in the causal model."""
    meta_model = build(base)
    names = frozenset(name for name, _ in linear_layers(meta_model.model))
    if not base.stored_4bit:
        return names
    return frozenset(name for name in names if is_stored_4bit(base, meta_model.sources[f"{name}.weight"]))


def resolved(folder: Path) -> BaseFolder:
    return resolve(str(folder), "main", Recorder())


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_transformers_bit_for_bit(base_of: BaseOf, family: str) -> None:
    for kind in ("none", "nf4", "fp4"):
        ours, theirs = load(base_of(family), kind), plain(base_of(family), family, kind)
        assert torch.equal(logits(ours, INPUT_IDS), logits(theirs, INPUT_IDS)), kind
        mine, others = dict(ours.named_buffers()), dict(theirs.named_buffers())
        assert mine.keys() == others.keys()
        for name, buffer in mine.items():
            assert torch.equal(buffer, others[name]) and buffer.dtype == others[name].dtype, name
        assert not any(parameter.requires_grad for parameter in ours.parameters()) and not ours.training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_is_in_4_bit(base_of: BaseOf, family: str) -> None:
    model = load(base_of(family))
    four_bit = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert four_bit == quantized_modules(base_of(family))
    assert {name.rpartition(".")[2] for name in four_bit} >= {"o_proj", "down_proj"} and "lm_head" not in four_bit
    kept = {
        parameter.dtype for name, parameter in model.named_parameters() if name.removesuffix(".weight") not in four_bit
    }
    assert kept == {torch.bfloat16} and model.is_loaded_in_4bit
    assert not load(base_of(family), "none").is_loaded_in_4bit


def test_an_evaluation_forward_leaves_the_codes_alone(base_of: BaseOf) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would repack the weight of a live model in place."""
    model = load(base_of("llama"))
    layer = model.model.layers[0].mlp.down_proj
    before, state = layer.weight.data.clone(), layer.weight.quant_state
    logits(model, INPUT_IDS)
    assert torch.equal(layer.weight.data, before) and layer.weight.quant_state is state
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_heads_tied_and_untied(tmp_path: Path, tied: bool) -> None:
    base = resolved(make_base("qwen2", tmp_path / "base", tie=tied))
    model = load(base)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in build(base).sources) != tied
    assert torch.equal(logits(model, INPUT_IDS), logits(plain(base, "qwen2", "nf4"), INPUT_IDS))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_as_well(tmp_path: Path, same: bool) -> None:
    """The weights decide, not the configuration."""
    folder = make_base("qwen2", tmp_path / "base", tie=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if not same:
        tensors["lm_head.weight"][5] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = resolved(folder)
    model = load(base, "none")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == same
    assert torch.equal(logits(model, INPUT_IDS), logits(plain(base, "qwen2"), INPUT_IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_stored_types_become_bf16(tmp_path: Path, dtype: torch.dtype) -> None:
    base = resolved(make_base("llama", tmp_path / "base", dtype=dtype))
    for kind in ("none", "nf4"):
        assert torch.equal(logits(load(base, kind), INPUT_IDS), logits(plain(base, "llama", kind), INPUT_IDS))


def test_large_tensors_go_through_in_blocks(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(base_of("phi3"))
    monkeypatch.setattr("qlora.model.load.VALUES_PER_BLOCK", 1000)
    monkeypatch.setattr("qlora.model.load.rows_in_block", lambda columns: 7)
    blocks = load(base_of("phi3"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, blocks.state_dict()[name]), name


def test_progress_ends_at_the_total(base_of: BaseOf) -> None:
    sink = Recorder()
    load_base(base_of("llama"), QuantizationSection(), "auto", CPU, sink)
    steps = [event for event in sink.events if isinstance(event, Progress)]
    assert steps and steps[-1].done == steps[-1].total == sum(
        entry.nbytes for entry in base_of("llama").tensors.values()
    )
    assert [step.done for step in steps] == sorted(step.done for step in steps)


@pytest.mark.parametrize("double", [True, False])
def test_a_base_stored_in_nf4_stays_as_it_is(base_of: BaseOf, tmp_path: Path, double: bool) -> None:
    stored = resolved(stored_in_4bit(tmp_path, base_of("llama"), double, ["lm_head", "v_proj"]))
    sink = Recorder()
    model = load_base(stored, QuantizationSection(type="fp4", double_quant=not double), "auto", CPU, sink)
    layer = model.model.layers[1].mlp.up_proj
    data, state = bnb.quantize_4bit(
        read_tensor(base_of("llama").tensors["model.layers.1.mlp.up_proj.weight"]),
        quant_type="nf4",
        compress_statistics=double,
    )
    assert torch.equal(layer.weight.data, data) and torch.equal(layer.weight.quant_state.absmax, state.absmax)
    assert (layer.weight.quant_type, layer.weight.compress_statistics) == ("nf4", double)
    assert type(model.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    assert len(quantized_modules(stored)) == 12 and model.is_loaded_in_4bit
    assert torch.equal(logits(model, INPUT_IDS), logits(plain_stored(stored), INPUT_IDS))
    assert any(isinstance(event, Notice) and "stored in 4 bit" in event.message for event in sink.events)
    with pytest.raises(ModelError, match="stored in 4 bit"):
        load(stored, "none")


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_map", "nested_quant_map", "weight"])
def test_4_bit_statistics_that_lie_are_refused(base_of: BaseOf, tmp_path: Path, part: str) -> None:
    """bitsandbytes' kernels would read past the end of what is too short."""
    folder = stored_in_4bit(tmp_path, base_of("llama"), True)
    name = "model.layers.0.mlp.up_proj.weight" + ("" if part == "weight" else f".{part}")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"statistics of .*up_proj.* cannot be read"):
        load(resolved(folder))


def plain_stored(base: BaseFolder) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16, trust_remote_code=False)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def multimodal(folder: Path, names: Callable[[str], str]) -> Path:
    """A tiny Gemma 3 with eyes, its tensors named by `names`."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=make_config("gemma3").to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors = {names(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return folder


def old_names(name: str) -> str:
    """As google/gemma-3-4b-it names its tensors: language_model.model.layers…, vision_tower.vision_model…"""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def new_names(name: str) -> str:
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@pytest.mark.parametrize("names", [old_names, new_names], ids=["old names", "new names"])
def test_the_text_part_of_a_multimodal_base(tmp_path: Path, names: Callable[[str], str]) -> None:
    from transformers import Gemma3ForConditionalGeneration

    base = resolved(multimodal(tmp_path / "base", names))
    prefix = "language_model.model." if names is old_names else "model.language_model."
    assert any(name.startswith(prefix) for name in base.tensors)
    sink = Recorder()
    model = load_base(base, QuantizationSection(type="none"), "auto", CPU, sink)
    assert type(model).__name__ == "Gemma3ForCausalLM" and model.lm_head.weight is model.model.embed_tokens.weight
    theirs = Gemma3ForConditionalGeneration.from_pretrained(base.path, dtype=torch.bfloat16, trust_remote_code=False)
    assert torch.equal(logits(model, INPUT_IDS), logits(theirs.eval(), INPUT_IDS))
    skipped = [event for event in sink.events if isinstance(event, Notice) and "skipped" in event.message]
    assert len(skipped) == 1 and skipped[0].count == len(base.tensors) - len(build(base).sources)
    assert "MiB" in skipped[0].message
    assert load(base).is_loaded_in_4bit


ODD = {
    "gpt_neox": {},
    "olmo2": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.0625},
    "starcoder2": {},
    "stablelm": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "alibi": False},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
}


@pytest.mark.parametrize("family", ODD)
def test_other_architectures_load_as_transformers_loads_them(tmp_path: Path, family: str) -> None:
    base = resolved(make_base(family, tmp_path / "base", overrides=ODD[family]))
    model = load(base, "none")
    attention = "eager" if model.config._attn_implementation == "eager" else "sdpa"
    theirs = plain(base, "gemma2" if attention == "eager" else family)
    assert torch.equal(logits(model, INPUT_IDS), logits(theirs, INPUT_IDS))
    others = dict(theirs.named_buffers())
    assert all(torch.equal(buffer, others[name]) for name, buffer in model.named_buffers())
    assert logits(load(base), INPUT_IDS).isfinite().all()
