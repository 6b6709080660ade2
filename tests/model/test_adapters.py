"""Adapters start as nothing, are the same from the same seed, and are opened again by plain peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from safetensors.torch import load_file, save_file

from qlora import device
from qlora.errors import ModelError
from qlora.model.adapters import attach, load_into, open_saved, save, trainable
from qlora.model.base_folder import BaseFolder
from qlora.recipe.sections import LoraSection
from tests.card import Card
from tests.families import FAMILIES
from tests.model.conftest import load, logits, plain

INPUT_IDS = torch.arange(5, 45)[None]
BaseOf = Callable[[str], BaseFolder]
KINDS = {
    "lora": LoraSection(r=4),
    "rslora gaussian": LoraSection(r=4, init="gaussian", use_rslora=True),
    "dora": LoraSection(r=4, use_dora=True),
}


def move(model: Any) -> None:
    """Adapters somewhere else than at their start."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("kind", "family"),
    [("lora", family) for family in FAMILIES]
    + [(kind, "gemma3") for kind in KINDS]
    + [("dora", "phi3"), ("dora", "qwen2")],
)
def test_nothing_changes_at_step_0(base_of: BaseOf, family: str, kind: str) -> None:
    for quantization in ("nf4", "none"):
        model = load(base_of(family), quantization)
        before = logits(model, INPUT_IDS)
        model = attach(model, KINDS[kind], seed=1)
        assert torch.equal(logits(model, INPUT_IDS), before)
        move(model)
        assert not torch.equal(logits(model, INPUT_IDS), before)
        with model.disable_adapter():
            assert torch.equal(logits(model, INPUT_IDS), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(base_of: BaseOf, family: str) -> None:
    model = load(base_of(family))
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    model = attach(model, LoraSection(r=4), seed=1)
    adapted = {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == linears and len(adapted) == (8 if family == "phi3" else 14)
    assert all(isinstance(module, Linear4bit) for module in model.modules() if hasattr(module, "lora_A"))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}
    assert all("lora_" in name for name in trainable(model)) and len(trainable(model)) == 2 * len(adapted)


def test_magnitudes_alone_are_float32(base_of: BaseOf) -> None:
    model = attach(load(base_of("llama")), LoraSection(r=4, use_dora=True), seed=1)
    for name, parameter in trainable(model).items():
        assert parameter.dtype == (torch.float32 if "magnitude" in name else torch.bfloat16), name


def test_the_seed_decides_and_nothing_else(base_of: BaseOf) -> None:
    def start(seed: int, quantization: str = "nf4") -> dict[str, torch.Tensor]:
        model = attach(load(base_of("llama"), quantization), LoraSection(r=4), seed)
        return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}

    torch.manual_seed(1)
    first = start(3)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.random.get_rng_state().ne(state).any()
    after = torch.random.get_rng_state()
    again, unquantized, other = start(3), start(3, "none"), start(4)
    assert torch.equal(after, torch.random.get_rng_state()), "the global random state is given back"
    assert list(first) == sorted(first) == list(again)
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, unquantized[name])
        assert torch.equal(value, other[name]) == ("lora_B" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_opens_what_is_saved(base_of: BaseOf, family: str, tmp_path: Path) -> None:
    base = base_of(family)
    for quantization in ("nf4", "none"):
        model = attach(load(base, quantization), LoraSection(r=4, use_rslora=True), seed=1)
        move(model)
        tuned = logits(model, INPUT_IDS)
        folder = tmp_path / quantization
        folder.mkdir()
        save(model, folder, "someone/base", "c0ffee")
        again = PeftModel.from_pretrained(plain(base, family, quantization), folder, autocast_adapter_dtype=False)
        assert torch.equal(logits(again, INPUT_IDS), tuned)


def test_saved_files_are_the_same_bytes_and_load_again(base_of: BaseOf, tmp_path: Path) -> None:
    lora = LoraSection(r=4, use_dora=True, dropout=0.1, modules_to_save=("lm_head",))
    model = attach(load(base_of("llama")), lora, seed=1)
    move(model)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save(model, tmp_path / name, "someone/base", "c0ffee")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/base", "c0ffee")
    assert config["target_modules"] == sorted(config["target_modules"]) and config["lora_alpha"] == 32
    other = attach(load(base_of("llama")), lora, seed=2)
    load_into(other, tmp_path / "one")
    assert torch.equal(logits(other, INPUT_IDS), logits(model, INPUT_IDS))
    for name, parameter in trainable(other).items():
        assert torch.equal(parameter, trainable(model)[name]) and parameter.dtype == trainable(model)[name].dtype
    smaller = attach(load(base_of("llama")), LoraSection(r=2), seed=2)
    with pytest.raises(ModelError, match="do not fit"):
        load_into(smaller, tmp_path / "one")


def test_a_tensor_without_a_place_is_refused(base_of: BaseOf, tmp_path: Path) -> None:
    """peft leaves it out, and says nothing."""
    model = attach(load(base_of("llama")), LoraSection(r=4), seed=1)
    move(model)
    save(model, tmp_path, "x", None)
    assert torch.equal(logits(open_saved(load(base_of("llama")), tmp_path), INPUT_IDS), logits(model, INPUT_IDS))
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.layers.0.mlp.gate.weight": torch.ones(2, 2)}, file)
    with pytest.raises(ModelError, match="1 of its tensors have no place"):
        open_saved(load(base_of("llama")), tmp_path)


def test_names_choose_layers(base_of: BaseOf) -> None:
    model = attach(load(base_of("qwen3")), LoraSection(r=4, target_modules=("q_proj", "layers.1.mlp.up_proj")), seed=1)
    adapted = [
        name.removeprefix("base_model.model.model.layers.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]
    assert adapted == ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("family", "lora", "what"),
    [
        ("llama", LoraSection(target_modules=("q_prj",)), "no linear layer 'q_prj'"),
        ("llama", LoraSection(target_modules=("embed_tokens",)), "no linear layer 'embed_tokens'"),
        ("llama", LoraSection(target_modules=("lm_head",)), "is the head"),
        ("phi3", LoraSection(target_modules=("q_proj",)), "no linear layer 'q_proj'"),
        ("llama", LoraSection(modules_to_save=("lm_haed",)), "no module 'lm_haed'"),
        ("llama", LoraSection(modules_to_save=("q_proj",)), "is held in 4 bit"),
        ("qwen2", LoraSection(modules_to_save=("lm_head",)), "shares its weight with model.embed_tokens"),
        ("qwen2", LoraSection(modules_to_save=("embed_tokens",)), "shares its weight with lm_head"),
        ("llama", LoraSection(init="eva"), "needs rows"),
    ],
)
def test_what_cannot_be_is_refused(base_of: BaseOf, family: str, lora: LoraSection, what: str) -> None:
    with pytest.raises(ModelError, match=what) as error:
        attach(load(base_of(family)), lora, seed=1)
    if "no linear layer" in what:
        assert ("qkv_proj" if family == "phi3" else "q_proj") in error.value.hint


def test_modules_to_save_are_trained_whole(base_of: BaseOf) -> None:
    model = load(base_of("llama"))
    before = logits(model, INPUT_IDS)
    model = attach(model, LoraSection(r=4, modules_to_save=("lm_head", "norm")), seed=1)
    whole = {name: parameter.dtype for name, parameter in trainable(model).items() if "modules_to_save" in name}
    assert set(whole.values()) == {torch.bfloat16} and len(whole) == 2
    assert torch.equal(logits(model, INPUT_IDS), before)


def test_a_cards_random_state_is_seeded_and_given_back(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """EVA's decomposition draws on the device of the layers."""
    model = load(base_of("llama"))
    monkeypatch.setattr(device, "accelerator", Card())
    states, seeds = {"now": torch.tensor([5])}, []
    monkeypatch.setattr(Card, "get_rng_state", lambda self, place: states["now"].clone())
    monkeypatch.setattr(Card, "set_rng_state", lambda self, state, place: states.update(now=state))
    real = torch.manual_seed

    def seed_everything(seed: int) -> torch.Generator:
        states["now"] = torch.tensor([seed])
        seeds.append(seed)
        return real(seed)

    monkeypatch.setattr(torch, "manual_seed", seed_everything)
    attach(model, LoraSection(r=4), seed=1)
    assert 1 in seeds and states["now"].tolist() == [5]


def test_global_training_mode_is_kept(base_of: BaseOf) -> None:
    model = load(base_of("llama"))
    assert not attach(model, LoraSection(r=4, dropout=0.5), seed=1).training
    assert not any(module.training for module in model.modules())
