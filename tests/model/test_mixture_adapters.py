"""Adapters on mixtures are where they were asked to be, and stay there when peft loads them again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ModelError
from qlora.events import Notice, Recorder
from qlora.model import adapters, lora_functions, mixture_adapters
from qlora.model.load import load_base
from qlora.model.meta_model import build_unmatched, linear_layers
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.families import make_config as make_dense
from tests.mixtures import FAMILIES, make_base, make_config
from tests.model.conftest import at
from tests.model.mixture_cases import logits

CPU = torch.device("cpu")
MLPS = ("gate_proj", "up_proj", "down_proj")
# Families whose layers of these names peft takes for experts, and with layers of such names beside the experts.
REWRITTEN = ("glm4_moe_lite", "deepseek_v2", "qwen3_next", "ernie4_5_moe")
ALL = LoraSection(r=4)


def on_meta(family: str) -> Any:
    return build_unmatched(make_config(family), "eager", "base")


def attached(model: Any, lora: LoraSection = ALL) -> set[str]:
    tuned = adapters.attach(model, lora, 0, functions="peft")
    return mixture_adapters.adapted_layers(tuned.get_base_model())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_layer_that_peft_can_load_again(family: str) -> None:
    """Attention, linear attention, dense and shared layers; never experts, routers or a shared expert's gate."""
    model = on_meta(family)
    layers = {name for name, _ in linear_layers(model)}
    taken = set(mixture_adapters.rewritten(model, layers))
    assert attached(model) == layers - taken
    assert not any("experts" in name.split(".") or name.endswith("expert_gate") for name in layers)


@pytest.mark.parametrize("family", REWRITTEN)
def test_layers_that_peft_takes_for_experts_are_left_out_unless_they_are_named(family: str) -> None:
    model = on_meta(family)
    taken = set(mixture_adapters.rewritten(model, [name for name, _ in linear_layers(model)]))
    assert taken and all(name.rpartition(".")[2] in MLPS for name in taken)
    named = attached(on_meta(family), LoraSection(r=4, target_modules=("o_proj", *MLPS)))
    assert named == taken | {name for name, _ in linear_layers(model) if name.endswith(".o_proj")}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("family", REWRITTEN[:2])
def test_without_its_names_kept_peft_adapts_something_else(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the context is for; and the comparison of what was asked with what was adapted sees it."""
    monkeypatch.setattr(mixture_adapters, "names_kept", lambda model: nullcontext())
    with pytest.raises(ModelError, match=r"peft has adapted .* layers, not the|lora.target_modules"):
        attached(on_meta(family), LoraSection(r=4, target_modules=("o_proj", *MLPS)))


def test_peft_s_functions_are_its_own_again_and_dense_models_never_lose_them() -> None:
    from peft.utils import transformers_weight_conversion as names

    own = names.convert_peft_config_for_transformers
    with mixture_adapters.names_kept(build_unmatched(make_dense("qwen3"), "eager", "base")):
        assert names.convert_peft_config_for_transformers is own
    with mixture_adapters.names_kept(on_meta("qwen3_moe")):
        assert names.convert_peft_config_for_transformers is not own
    assert names.convert_peft_config_for_transformers is own


@pytest.mark.parametrize(
    ("family", "keys", "what"),
    [
        ("qwen3_moe", {"target_modules": ("mlp.gate",)}, "lora.target_modules: mlp.gate chooses or weighs experts"),
        ("gemma4_text", {"target_modules": ("router.proj",)}, "router.proj chooses or weighs experts"),
        ("qwen2_moe", {"target_modules": ("shared_expert_gate",)}, "shared_expert_gate chooses or weighs"),
        (
            "qwen3_moe",
            {"target_modules": ("gate_up_proj",)},
            "gate_up_proj are experts, which are parameters and no layers",
        ),
        (
            "qwen3_moe",
            {"target_modules": ("q_proj", "experts")},
            "experts are experts, which are parameters and no layers",
        ),
        ("qwen3_moe", {"modules_to_save": ("mlp.gate",)}, "lora.modules_to_save: mlp.gate chooses or weighs experts"),
        ("qwen3_moe", {"modules_to_save": ("experts",)}, "lora.modules_to_save: experts are experts"),
    ],
)
def test_routers_and_experts_take_no_adapter(family: str, keys: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError, match=what) as refusal:
        attached(on_meta(family), LoraSection(r=4, **keys))
    assert refusal.value.hint and "\n" not in refusal.value.what + refusal.value.hint


def test_the_down_projection_of_dense_layers_can_be_named_beside_that_of_experts() -> None:
    """One name of both: the linear layers get adapters, the experts none."""
    found = attached(on_meta("qwen2_moe"), LoraSection(r=4, target_modules=("down_proj",)))
    assert found == {f"model.layers.{layer}.mlp.shared_expert.down_proj" for layer in (0, 1)}


def tuned(family: str, folder: Path, lora: LoraSection, sink: Recorder) -> Any:
    model = load_base(at(make_base(family, folder)), QuantizationSection(type="none"), "eager", CPU, sink)
    found = adapters.attach(model, lora, 0, functions="peft")
    lora_functions.say_what_stays(found, lora, sink)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapters.trainable(found).items():
        if "lora_B" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16()
    return found.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_opens_in_plain_peft_with_the_same_logits(family: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sink = Recorder()
    ours = tuned(family, tmp_path / "base", ALL, sink)
    (tmp_path / "adapter").mkdir()
    adapters.save(ours, tmp_path / "adapter", "base", None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, attn_implementation="eager")
    bare = logits(plain)
    opened = PeftModel.from_pretrained(plain, tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    assert torch.equal(logits(opened), logits(ours)) and not torch.equal(logits(opened), bare)
    said = [one.message for one in sink.events if isinstance(one, Notice)]
    assert any("experts and routers stay frozen" in message for message in said)


def test_named_layers_are_said_to_be_lost_in_peft_and_are_loaded_here(tmp_path: Path) -> None:
    """peft 0.21.2 would put them on the experts: who wants to use them is told what to do."""
    sink = Recorder()
    lora = LoraSection(r=4, target_modules=("o_proj", *MLPS))
    ours = tuned("glm4_moe_lite", tmp_path / "base", lora, sink)
    (tmp_path / "adapter").mkdir()
    adapters.save(ours, tmp_path / "adapter", "base", None)
    said = [one for one in sink.events if isinstance(one, Notice) and "peft#3711" in one.message]
    assert len(said) == 1 and said[0].count == 6
    base = load_base(at(tmp_path / "base"), QuantizationSection(type="none"), "eager", CPU, Recorder())
    again = adapters.open_saved(base, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(ours))
    fresh = load_base(at(tmp_path / "base"), QuantizationSection(type="none"), "eager", CPU, Recorder())
    resumed = adapters.attach(fresh, lora, 1, functions="peft")
    adapters.load_into(resumed, tmp_path / "adapter")
    assert torch.equal(logits(resumed.eval()), logits(ours))
