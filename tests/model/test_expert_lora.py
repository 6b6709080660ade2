"""Adapters on experts against peft's own, which adds all deltas to all weights: same outputs, gradients and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.errors import ModelError, UserError
from qlora.events import Notice, Recorder
from qlora.model import adapters, expert_layout, expert_lora, experts, lora_functions, mixture_adapters
from qlora.model.adapter_folder import read_adapter
from qlora.model.load import load_base
from qlora.model.meta_model import build_unmatched
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.layerwise import set_gradient_checkpointing
from tests.families import make_config as make_dense
from tests.mixtures import FAMILIES, MIXTURES, make_base, make_config
from tests.model.conftest import at
from tests.model.mixture_cases import LORA, furthest, gradients_by_file, held, modules_of, pair, passed, with_values
from tests.model.mixture_cases import logits as logits_of

CPU = torch.device("cpu")
TOLERANCE = 1e-6  # of one module of experts, by 2-norms
OF_A_MODEL = 5e-6  # what all layers add to it: the sums of peft's weights are rounded, and ours have none


@pytest.mark.parametrize("shape", ["wide", "narrow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_what_peft_s_gives_and_twice_the_same(family: str, shape: str) -> None:
    """Output, and gradients of inputs and all adapters; recomputed and done again bit for bit."""
    ours, theirs = pair(family, shape)
    found = passed(ours)
    assert furthest(found, passed(theirs))[0] <= OF_A_MODEL
    assert all(map(torch.equal, found.values(), passed(ours).values()))
    set_gradient_checkpointing(ours.get_base_model(), True, False)
    assert all(map(torch.equal, found.values(), passed(ours).values()))


ROUTINGS: dict[str, Tensor] = {
    "even": torch.stack((torch.arange(24) % 4, (torch.arange(24) + 1) % 4), dim=1),
    "skewed, and experts without a token": torch.tensor([[3, 1]] * 11 + [[1, 3], [3, 0]]),
    "one token": torch.tensor([[2, 0]]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", ["wide", "narrow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_module_has_peft_s_gradients(family: str, shape: str, routing: str) -> None:
    ours, theirs = pair(family, shape)
    index_TK = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(7)
    width = ours.config.hidden_size
    hidden_TH, gradient_TH = (torch.randn(len(index_TK), width, generator=generator) for _ in range(2))
    weights_TK = torch.rand(index_TK.shape, generator=generator)
    found = []
    for model in (ours, theirs):
        for parameter in adapters.trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)
        given_TH = hidden_TH.clone().requires_grad_()
        output_TH = modules_of(model)[0](given_TH, index_TK, weights_TK)
        output_TH.backward(gradient_TH)
        gradients = {"output": output_TH.detach(), "inputs": given_TH.grad, **gradients_by_file(model)}
        found.append({name: tensor for name, tensor in gradients.items() if bool(tensor.any())})
    of_lora = [name for name in found[0] if ".lora_" in name]
    assert len(of_lora) == 4 and all(".experts." in name for name in of_lora)
    assert furthest(*found)[0] <= TOLERANCE
    for name in of_lora:
        count = int(modules_of(ours)[0].num_experts)
        by_expert = found[0][name].reshape(count, -1) if "lora_A" in name else found[0][name].unflatten(1, (-1, count))
        hit = by_expert.any(1) if "lora_A" in name else by_expert.any(0).any(0)
        assert set(hit.nonzero().flatten().tolist()) == set(index_TK.flatten().tolist()), name


def test_rank_stabilized_scales_are_peft_s() -> None:
    ours, theirs = pair("qwen3_moe", "wide", LORA.model_copy(update={"use_rslora": True}))
    assert furthest(passed(ours), passed(theirs))[0] <= OF_A_MODEL
    (_, one), *_ = expert_lora.adapted(ours.get_base_model())
    assert one.scale == pytest.approx(12 / 4**0.5)


# What an engineer could get wrong; each must be seen by a comparison with peft.


def blocked(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns of B one expert after the other, as the rows of A are."""
    return a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], count, -1).permute(1, 2, 0)


def halves_swapped(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Gate and up exchanged."""
    A, B = OF_FILE(a, b, count)
    return A, B.roll(B.shape[2] // 2, 2) if B.shape[2] != a.shape[1] and B.shape[2] % 2 == 0 else B


def not_interleaved(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """gpt-oss' rows taken for gate's, then up's."""
    A, B = OF_FILE(a, b, count)
    return A, torch.cat((B[..., ::2], B[..., 1::2]), dim=2)


OF_FILE = expert_layout.of_file


@pytest.mark.parametrize("fault", [blocked, halves_swapped, not_interleaved])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_another_layout_is_another_model(family: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(family, "wide")
    wanted = passed(theirs)["logits"]
    assert furthest({"x": passed(ours)["logits"]}, {"x": wanted})[0] <= OF_A_MODEL
    state = expert_lora.stored_state(ours)
    monkeypatch.setattr(expert_lora, "of_file", fault)
    expert_lora.load_state(ours, state)
    assert float((passed(ours)["logits"] - wanted).abs().max()) > 1e-3


# --- attached, saved, loaded --------------------------------------------------------------------------------------


def test_what_is_adapted_is_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers beside the experts as without them, every projection of experts once, routers never; also with peft's
    rewriting of names on, which would adapt experts by its own wrappers."""
    for family in MIXTURES:
        with_experts = adapters.attach(build_unmatched(make_config(family), "eager", "base"), LORA, 0, functions="peft")
        without = adapters.attach(
            build_unmatched(make_config(family), "eager", "base"),
            LORA.model_copy(update={"experts": False}),
            0,
            functions="peft",
        )
        layers = [mixture_adapters.adapted_layers(model.get_base_model()) for model in (with_experts, without)]
        assert layers[0] == layers[1]
        causal_lm = with_experts.get_base_model()
        found = [name for name, _ in expert_lora.adapted(causal_lm)]
        assert found == sorted(name for name, _, _ in experts.projections(causal_lm)) and len(found) >= 2
        assert not any("router" in name or ".gate." in name for name in adapters.trainable(with_experts))


def test_fresh_adapters_change_nothing_and_follow_the_seed() -> None:
    model, _ = held(make_config("qwen3_moe"))
    ids_BS = torch.arange(4, 40)[None]
    with torch.no_grad():
        bare = model(input_ids=ids_BS, use_cache=False).logits
        ours = adapters.attach(model.requires_grad_(False), LORA, 5, functions="peft").eval()
        assert torch.equal(ours(input_ids=ids_BS, use_cache=False).logits, bare)
        with_values(ours)
        tuned_logits = ours(input_ids=ids_BS, use_cache=False).logits
        assert not torch.equal(tuned_logits, bare)
        with ours.disable_adapter():
            assert torch.equal(ours(input_ids=ids_BS, use_cache=False).logits, bare)
        assert torch.equal(ours(input_ids=ids_BS, use_cache=False).logits, tuned_logits)
    trained = adapters.trainable(ours)
    again = adapters.trainable(adapters.attach(held(make_config("qwen3_moe"))[0].requires_grad_(False), LORA, 5))
    of_a = [name for name in trained if name.endswith("_adapter.lora_A")]
    assert len(of_a) == 4 and all(torch.equal(trained[name], again[name]) for name in of_a)
    assert {trained[name].dtype for name in of_a} == {torch.bfloat16}
    assert float(trained[of_a[0]].detach().abs().max()) <= 1 / trained[of_a[0]].shape[2] ** 0.5 * 1.01
    other = adapters.trainable(adapters.attach(held(make_config("qwen3_moe"))[0].requires_grad_(False), LORA, 6))
    assert not torch.equal(trained[of_a[0]], other[of_a[0]])


def saved(family: str, folder: Path, lora: LoraSection, sink: Recorder) -> Any:
    """A tuned mixture of 16-bit experts, whose adapter lies in `folder`/adapter."""
    model = load_base(at(make_base(family, folder / "base")), QuantizationSection(type="none"), "eager", CPU, sink)
    ours = with_values(adapters.attach(model, lora, 0, functions="peft"))
    lora_functions.say_what_stays(ours, lora, sink)
    (folder / "adapter").mkdir()
    adapters.save(ours, folder / "adapter", "base", None)
    return ours.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_opens_in_plain_peft_with_the_same_logits(family: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sink = Recorder()
    ours = saved(family, tmp_path, LORA, sink)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    bare = logits_of(plain)
    opened = PeftModel.from_pretrained(plain, tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    wanted = logits_of(opened)
    assert float((wanted - bare).abs().max()) > 0.1
    exact = ours.float()  # the same values, computed in fp32 as peft's sum of weights is
    with torch.no_grad():
        off = exact(input_ids=torch.arange(4, 40)[None], use_cache=False).logits - wanted
    assert float(off.abs().max()) <= 1e-4 * float(wanted.abs().max())
    said = [one.message for one in sink.events if isinstance(one, Notice)]
    assert any("routers stay frozen. Experts that no token of a step goes to follow" in message for message in said)


def test_an_adapter_is_loaded_back_bit_for_bit_and_opened_again(tmp_path: Path) -> None:
    ours = saved("gpt_oss", tmp_path, LORA, Recorder())
    state = expert_lora.stored_state(ours)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    for again in (
        adapters.attach(fresh(tmp_path), LORA, 1, functions="peft"),
        adapters.open_saved(fresh(tmp_path), tmp_path / "adapter"),
    ):
        if any(parameter.requires_grad for parameter in again.parameters()):
            adapters.load_into(again, tmp_path / "adapter")
        assert all(torch.equal(one, expert_lora.stored_state(again)[name]) for name, one in state.items())
        ids_BS = torch.arange(4, 40)[None]
        with torch.no_grad():
            found, wanted = (model.eval()(input_ids=ids_BS, use_cache=False).logits for model in (again, ours))
        assert torch.equal(found, wanted)


def fresh(folder: Path) -> Any:
    return load_base(at(folder / "base"), QuantizationSection(type="none"), "eager", CPU, Recorder())


# --- files of others ------------------------------------------------------------------------------------------------


def change(folder: Path, **keys: Any) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def rewrite(folder: Path, to: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in to(load_file(file)).items()}, file)


def exchanged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As peft 0.18 wrote them: what lora_A has as inputs are lora_B's outputs."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if ".experts." in name and ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            found[name], found[other] = tensors[other].t(), tensor.t()
    return found


@pytest.mark.parametrize(
    ("break_it", "what"),
    [
        (lambda folder: rewrite(folder, exchanged), "has in and out exchanged, as peft 0.18 wrote"),
        (lambda folder: change(folder, r=2, rank_pattern={"q_proj|k_proj|v_proj|o_proj": 4}), "is of 16 experts"),
        (lambda folder: change(folder, r=3), "no multiple of its rank 3|has rank 4, adapter_config.json says 3"),
        (lambda folder: change(folder, target_parameters=["experts.down_proj"]), "target_parameters does not name"),
        (lambda folder: change(folder, target_parameters=["gate.weight"]), "bare parameter gate.weight"),
        (lambda folder: change(folder, target_parameters=["other.down_proj"]), "fits no tensor"),
        (lambda folder: change(folder, target_parameters=None), "is an adapter on a parameter that target_parameters"),
    ],
)
def test_adapters_on_other_experts_are_refused(break_it: Any, what: str, tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path, LORA, Recorder())
    break_it(tmp_path)
    with pytest.raises(UserError, match=what) as refusal:
        mixture_adapters.refuse_other_experts(read_adapter(tmp_path / "adapter"), at(tmp_path / "base"))
    assert refusal.value.hint and "\n" not in refusal.value.what + refusal.value.hint


def test_a_square_projection_of_an_old_peft_is_known_by_its_version(tmp_path: Path) -> None:
    """in and out are of one size, so that no shape tells them apart."""
    folder = tmp_path
    make_base("qwen3_moe", folder / "base", overrides={"moe_intermediate_size": 64})
    model = load_base(at(folder / "base"), QuantizationSection(type="none"), "eager", CPU, Recorder())
    (folder / "adapter").mkdir()
    adapters.save(adapters.attach(model, LORA, 0), folder / "adapter", "base", None)
    mixture_adapters.refuse_other_experts(read_adapter(folder / "adapter"), at(folder / "base"))
    for version in ("0.18.1", None):
        change(folder, peft_version=version)
        with pytest.raises(UserError, match="in and out exchanged"):
            mixture_adapters.refuse_other_experts(read_adapter(folder / "adapter"), at(folder / "base"))


def test_a_dense_base_has_no_experts() -> None:
    with pytest.raises(ModelError, match=r"lora.experts = true: the base is no mixture of experts") as refusal:
        adapters.attach(build_unmatched(make_dense("qwen3"), "eager", "base"), LORA, 0)
    assert refusal.value.hint
