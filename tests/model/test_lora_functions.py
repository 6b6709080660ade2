"""Layers computed by our functions give peft's numbers, and peft gets back whatever they do not compute."""

from __future__ import annotations

import gc
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora import numerics
from qlora.events import Notice, Recorder
from qlora.memory.simulation import Workload
from qlora.model import adapters, lora_functions, rotary
from qlora.model.base_folder import BaseFolder
from qlora.model.lora_functions import NORMED, OURS, PEFT, again, choose, say_what_stays
from qlora.numerics import Numerics
from qlora.recipe.sections import LoraSection
from qlora.step.forward import CausalParts, batch_loss, forward_backward, seed_micro_batch
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from tests.memory.counted import real_batch
from tests.model.conftest import load, logits

BaseOf = Callable[[str], BaseFolder]
LORA = LoraSection(r=4, use_rslora=True)
IDS = torch.arange(5, 45)[None]
FP32, BF16 = torch.float32, torch.bfloat16


def tuned(
    base: BaseFolder, functions: str, dtype: torch.dtype, quantization: str = "nf4", lora: LoraSection = LORA
) -> Any:
    """A model whose B is not zero, all of it computed in `dtype`."""
    model = load(base, quantization)
    if dtype != BF16:
        for layer in model.modules():
            if type(layer).__name__ == "Linear4bit":
                layer.compute_dtype = layer.weight.quant_state.dtype = dtype
        model = model.to(dtype)
    model = adapters.attach(model, lora, 1, dtype, functions=functions)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def gradients(model: Any, recompute: bool = True) -> dict[str, torch.Tensor]:
    """Of packed rows, as a step makes them."""
    causal_lm = model.get_base_model()
    set_gradient_checkpointing(causal_lm, recompute, keep_random_state=False)
    model.train()
    batch = real_batch(Workload(2, 24), causal_lm.config.vocab_size)
    forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), 10.0)
    found = {name: parameter.grad for name, parameter in adapters.trainable(model).items()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def apart(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Of whole gradients, relative to the right one's norm."""
    one, other = (torch.cat([tensors[name].double().flatten() for name in right]) for tensors in (found, right))
    return float((one - other).norm() / other.norm())


def classes(model: Any) -> set[str]:
    return {kind.__qualname__.rpartition(".")[2] for one in model.modules() for kind in [type(one).__mro__[0]]}


@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "nf4"), ("qwen2", "none"), ("gemma2", "fp4"), ("phi3", "nf4")]
)
def test_float32_gradients_are_pefts(base_of: BaseOf, family: str, quantization: str) -> None:
    pefts = gradients(tuned(base_of(family), PEFT, FP32, quantization))
    for who in (OURS, NORMED):
        model = tuned(base_of(family), who, FP32, quantization)
        kind, before = type(model.get_base_model().model.norm).__mro__[:2]
        assert (kind.__name__ == before.__name__) == (who == NORMED), (
            "ours goes by the name of what it takes the place of"
        )
        ours = gradients(model)
        assert ours.keys() == pefts.keys()
        assert max(apart({name: ours[name]}, {name: pefts[name]}) for name in pefts) <= 2e-6


@pytest.fixture
def in_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of any length go through an MLP in tiles of 20, of which the last is shorter; each call's rows."""
    rows: list[int] = []
    tiled = lora_functions.tiled_mlp
    monkeypatch.setattr(lora_functions, "TILE_ROWS", 20)
    monkeypatch.setattr(lora_functions, "in_tiles", lambda x, inner, tile: tile == 20)
    monkeypatch.setattr(
        lora_functions, "tiled_mlp", lambda x, *about: rows.append(x.numel() // x.shape[-1]) or tiled(x, *about)
    )
    return rows


@pytest.mark.parametrize(("family", "quantization"), [("llama", "nf4"), ("qwen2", "none"), ("gemma3", "fp4")])
def test_float32_gradients_are_pefts_in_tiles_too(
    base_of: BaseOf, family: str, quantization: str, in_tiles: list[int]
) -> None:
    if family == "gemma3":  # whose MLP is gated by another function
        gradients(tuned(base_of(family), OURS, FP32, quantization))
        assert not in_tiles
        return
    ours, pefts = (gradients(tuned(base_of(family), who, FP32, quantization)) for who in (OURS, PEFT))
    assert max(apart({name: ours[name]}, {name: pefts[name]}) for name in pefts) <= 2e-6
    assert set(in_tiles) == {48}


def test_in_bf16_tiles_are_no_farther_from_the_truth_than_peft(base_of: BaseOf, in_tiles: list[int]) -> None:
    half = {who: gradients(tuned(base_of("llama"), who, BF16)) for who in (NORMED, OURS, PEFT)}
    with numerics.in_force(Numerics(functions=OURS)):
        whole = gradients(tuned(base_of("llama"), OURS, BF16))
    truth = true_gradients(base_of("llama"))
    assert apart(half[OURS], truth) <= 1.05 * apart(half[PEFT], truth)
    assert apart(half[NORMED], truth) <= 1.05 * apart(half[PEFT], truth)
    assert apart(half[OURS], truth) <= 1.05 * apart(whole, truth) and in_tiles


def test_a_run_without_tiles_goes_on_without(base_of: BaseOf, in_tiles: list[int]) -> None:
    for recorded, calls in ((Numerics(functions=OURS), 0), (Numerics(functions=OURS, mlp_tile=20), 4)):
        in_tiles.clear()
        with numerics.in_force(recorded):
            model = tuned(base_of("llama"), OURS, BF16)
        gradients(model)
        assert len(in_tiles) == calls, "of two layers, each computed twice"


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "phi3"])
def test_the_loss_is_pefts_but_for_rounding(base_of: BaseOf, family: str) -> None:
    """In float32 to its last digits; in bf16 they differ by 3e-4 of it on such a model, none nearer to the truth."""
    found = {}
    for who in (OURS, PEFT, lora_functions.IN_TRITON, lora_functions.FUSED):
        causal_lm = tuned(base_of(family), who, FP32).get_base_model()
        batch = real_batch(Workload(2, 24), causal_lm.config.vocab_size)
        with torch.no_grad():
            found[who] = float(batch_loss(CausalParts.of(causal_lm), batch, SupervisedObjective()))
    assert found[OURS] == pytest.approx(found[PEFT], rel=1e-6)
    assert found[lora_functions.IN_TRITON] == pytest.approx(found[PEFT], rel=1e-6)
    assert found[lora_functions.FUSED] == pytest.approx(found[PEFT], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_gradients_add_up_and_noise_is_the_same(base_of: BaseOf, alpha: float) -> None:
    """Two micro-batches, with NEFTune's noise on their embeddings and without."""
    found = []
    for who in (OURS, PEFT):
        model = tuned(base_of("llama"), who, FP32).train()
        causal_lm = model.get_base_model()
        set_gradient_checkpointing(causal_lm, 1, keep_random_state=False)
        for micro_step, length in enumerate((24, 16)):
            seed_micro_batch(3, 1, micro_step)
            batch = real_batch(Workload(2, length), causal_lm.config.vocab_size)
            forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), 10.0, alpha)
        found.append({name: parameter.grad for name, parameter in adapters.trainable(model).items()})
    assert apart(*found) <= 2e-6  # type: ignore[arg-type]
    assert found[0].keys() == found[1].keys()


def test_eva_starts_alike(base_of: BaseOf) -> None:
    """It looks at layers' inputs by hooks, before the functions are there; what is attached then is trained by them."""
    lora = LoraSection(r=2, init="eva", target_modules=("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"))
    starts, found = [], []
    for who in (OURS, PEFT):
        model = load(base_of("llama"))
        batch = real_batch(Workload(2, 24), model.config.vocab_size)
        model = adapters.attach(model, lora, 1, eva_batches=[batch], functions=who)
        starts.append({name: parameter.clone() for name, parameter in adapters.trainable(model).items()})
        with torch.no_grad():
            found.append(logits(model, IDS))
    assert all(torch.equal(one, starts[1][name]) for name, one in starts[0].items())
    assert any(bool(one.any()) for name, one in starts[0].items() if "lora_A" in name)
    torch.testing.assert_close(found[0].float(), found[1].float(), atol=0.05, rtol=0)


def true_gradients(base: BaseFolder) -> dict[str, torch.Tensor]:
    """Of the same weights, rounded to bf16, computed in float32."""
    truth = tuned(base, PEFT, FP32)
    for layer, rounded in zip(truth.modules(), tuned(base, PEFT, BF16).modules(), strict=True):
        for name, parameter in layer._parameters.items():
            if parameter is not None and parameter.dtype == FP32:
                parameter.data.copy_(rounded._parameters[name])  # type: ignore[arg-type]
    for layer in truth.modules():
        if type(layer).__name__ == "Linear4bit" and not hasattr(layer, "lora_A"):
            weight = lora_functions._weight_of(layer, BF16, False).float()
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            layer.forward = plain.forward
    return gradients(truth)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bf16_gradients_are_as_near_to_the_truth_as_pefts(base_of: BaseOf, family: str) -> None:
    base = base_of(family)
    half = {who: tuned(base, who, BF16) for who in (OURS, PEFT)}
    half |= {who: tuned(base, who, BF16) for who in (lora_functions.IN_TRITON, lora_functions.FUSED)}
    right = true_gradients(base)
    of_peft = apart(gradients(half.pop(PEFT)), right)
    assert len(half) == 3 and all(apart(gradients(one), right) <= 1.05 * of_peft for one in half.values())


def test_with_and_without_recomputation_the_bits_are_the_same(base_of: BaseOf) -> None:
    one, other = (gradients(tuned(base_of("llama"), OURS, BF16), recompute) for recompute in (True, False))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_the_functions_do_not_compute_is_pefts(base_of: BaseOf) -> None:
    ours, pefts = (tuned(base_of("llama"), who, FP32) for who in (OURS, PEFT))
    for model in (ours, pefts):
        model.add_adapter("second", model.peft_config["default"])
    results: list[list[torch.Tensor]] = []
    for model in (ours, pefts):
        found = []
        with model.disable_adapter():
            found.append(logits(model, IDS))
        model.base_model.set_adapter(["default", "second"])
        found.append(logits(model, IDS))
        model.base_model.set_adapter("default")
        with torch.autocast("cpu", BF16):
            found.append(logits(model, IDS))
        results.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(results[0][0], results[0][1])


def test_an_adapter_is_saved_and_loaded_as_ever(base_of: BaseOf, tmp_path: Path) -> None:
    ours, pefts = (tuned(base_of("llama"), who, BF16) for who in (OURS, PEFT))
    assert list(ours.state_dict()) == list(pefts.state_dict())
    for name, model in (("ours", ours), ("pefts", pefts)):
        (tmp_path / name).mkdir()
        adapters.save(model, tmp_path / name, "someone/base", None)
    for file in (tmp_path / "ours").iterdir():
        assert file.read_bytes() == (tmp_path / "pefts" / file.name).read_bytes()
    fresh = adapters.attach(load(base_of("llama")), LORA, 2, functions=OURS)
    adapters.load_into(fresh, tmp_path / "pefts")
    assert torch.equal(logits(fresh, IDS), logits(ours, IDS))
    with pytest.warns(UserWarning, match="rounding errors"):  # peft's own, of every merge on 4 bit
        merged = [model.merge_and_unload().state_dict() for model in (ours, pefts)]
    assert all(torch.equal(one, merged[1][name]) for name, one in merged[0].items())


@pytest.mark.parametrize(
    ("noted", "who"),
    [
        *((OURS, OURS), (lora_functions.IN_TRITON, OURS), (lora_functions.FUSED, OURS)),
        *((PEFT, PEFT), (None, PEFT), ("of a later version", PEFT)),
    ],
)
def test_a_saved_adapter_is_computed_as_its_run_did(
    base_of: BaseOf, tmp_path: Path, noted: str | None, who: str
) -> None:
    """What a run measured is measured again: with its functions where they are here, and else with peft's."""
    expected = tuned(base_of("llama"), who, BF16)
    adapters.save(expected, tmp_path, "someone/base", None)
    note = {"base": "b", "revision": "main", "quantization": {"type": "nf4", "double_quant": True}}
    (tmp_path / "qlora.json").write_text(json.dumps(note | ({"functions": noted} if noted else {})))
    opened = adapters.open_saved(load(base_of("llama")), tmp_path)
    assert torch.equal(logits(opened, IDS), logits(expected, IDS))
    other = adapters.attach(load(base_of("llama")), LORA, 1, functions=PEFT if who == OURS else OURS)
    adapters.load_into(other, tmp_path)
    assert not torch.equal(logits(opened, IDS), logits(other, IDS))
    (tmp_path / "qlora.json").unlink()  # made elsewhere, as far as one can tell
    assert lora_functions.of_saved(tmp_path, torch.device("cpu")) == PEFT


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("at", [3, 16, 24])  # in the forward pass of 14 layers, early in the backward pass, and late
def test_memory_that_runs_out_inside_leaves_nothing(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch, at: int, recompute: bool
) -> None:
    """Functions keep tensors for their backward pass: with the error they are gone, and the pass is done again."""
    model = tuned(base_of("llama"), OURS, BF16)
    right = {name: gradient.clone() for name, gradient in gradients(model, recompute).items()}
    model.zero_grad()

    def alive() -> int:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries leave behind answers with warnings
            return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    real, calls, before = lora_functions.dequantize, itertools.count(), alive()

    def dequantized(*given: Any) -> torch.Tensor:
        if next(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(lora_functions, "dequantize", dequantized)
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, recompute)
    assert next(calls) == at + 1
    model.zero_grad()
    assert alive() <= before
    again = gradients(model, recompute)
    assert all(torch.equal(again[name], right[name]) for name in right)


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        (LoraSection(r=4, dropout=0.1), "lora.dropout is not 0"),
        (LoraSection(r=4, use_dora=True), "DoRA is another function"),
    ],
)
def test_peft_computes_what_is_another_function_and_a_notice_says_so(
    base_of: BaseOf, lora: LoraSection, why: str
) -> None:
    assert choose(lora) == PEFT
    model = adapters.attach(load(base_of("llama")), lora, 1, functions=OURS)
    assert all(type(one).forward.__module__.startswith("peft") for one in model.modules() if hasattr(one, "lora_A"))
    recorder = Recorder()
    say_what_stays(model, lora, recorder)
    (notice,) = recorder.events
    assert isinstance(notice, Notice) and why in notice.message and notice.count == 14
    say_what_stays(adapters.attach(load(base_of("llama")), LORA, 1, functions=OURS), LORA, recorder)
    assert len(recorder.events) == 1


def test_a_rotation_that_no_kernel_knows_is_said(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, fused = Recorder(), lora_functions.FUSED
    with numerics.in_force(Numerics(functions=fused)):
        say_what_stays(tuned(base_of("llama"), fused, BF16), LORA, recorder)
        assert recorder.events == []
        monkeypatch.setattr(rotary, "form_of", lambda function: None)
        say_what_stays(tuned(base_of("llama"), fused, BF16), LORA, recorder)
    (notice,) = recorder.events
    assert isinstance(notice, Notice) and "the model's own function" in notice.message and notice.count == 1


def test_a_run_goes_on_with_the_functions_that_it_began_with() -> None:
    assert choose(LORA) == NORMED == choose(LORA, Numerics(functions=NORMED))
    assert choose(LORA, Numerics(functions=OURS)) == OURS
    assert choose(LORA, Numerics()) == PEFT == choose(LORA, Numerics(functions=PEFT))
    assert lora_functions.of_run() == PEFT  # outside of runs: exports, and whoever compares with them


def test_nothing_waits_behind_a_pass_that_failed(base_of: BaseOf) -> None:
    """What q computed for k and v holds a whole graph: memory that ran out would stay taken."""
    model = tuned(base_of("llama"), OURS, BF16)
    attention = model.get_base_model().model.layers[0].self_attn

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = attention.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(input_ids=IDS)
    handle.remove()
    assert not any("_shared" in vars(one) for one in model.modules())
    assert logits(model, IDS).isfinite().all()


def test_layers_of_one_input_are_computed_together(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = lora_functions.shared_input
    monkeypatch.setattr(lora_functions, "shared_input", lambda x, *rest: sizes.append(len(rest[0])) or real(x, *rest))  # type: ignore[func-returns-value]
    logits(tuned(base_of("llama"), OURS, BF16), IDS)
    assert sizes == [3, 1] * 2  # q, k and v, then o; the MLP is a function of its own
    sizes.clear()
    logits(
        tuned(base_of("gemma2"), OURS, BF16, lora=LoraSection(r=4, target_modules=("q_proj", "v_proj", "up_proj"))), IDS
    )
    assert sizes == [2, 1] * 2


@pytest.mark.parametrize("kernels", [lora_functions.IN_TRITON, lora_functions.FUSED])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_with_kernels_the_numbers_are_the_same(base_of: BaseOf, family: str, kernels: str) -> None:
    """Their twins, where there is no GPU: in float32 to rounding; of the base every bit."""
    ours, in_triton = (tuned(base_of(family), who, FP32) for who in (OURS, kernels))
    layer = in_triton.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert all(
        torch.equal(lora_functions._weight_of(layer, kind, True), lora_functions._weight_of(layer, kind, False))
        for kind in (BF16, FP32)
    )
    assert apart(gradients(in_triton), gradients(ours)) <= 2e-6


def test_kernels_are_chosen_where_they_run_and_by_runs_that_had_them() -> None:
    in_triton, fused = lora_functions.IN_TRITON, lora_functions.FUSED
    assert choose(LORA, None, kernels=True) == fused == choose(LORA, Numerics(functions=fused), kernels=True)
    assert choose(LORA, Numerics(functions=in_triton), kernels=True) == in_triton
    assert choose(LORA, Numerics(functions=OURS), kernels=True) == OURS
    assert choose(LORA, Numerics(functions=in_triton)) == NORMED == again(fused, kernels=False)


def test_a_few_rows_on_a_card_are_pefts(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes multiplies them in 4 bit, without a dequantized weight."""
    model = tuned(base_of("llama"), OURS, BF16).eval()
    monkeypatch.setattr(lora_functions, "is_card", lambda device: True)
    ours, calls = lora_functions._outputs, []
    monkeypatch.setattr(lora_functions, "_outputs", lambda *about: calls.append(about) or ours(*about))
    few = IDS[:, : lora_functions.FEW_ROWS]
    with torch.no_grad():
        model(input_ids=few)
        assert not calls
        model(input_ids=IDS)
        assert calls
