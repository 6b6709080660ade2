"""Experts in 4 bit: each as `nf4` has it, bit for bit, and a model of them against plain transformers' in fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora import numerics
from qlora.model import adapters, experts
from qlora.model.experts import Slab
from qlora.model.meta_model import build_unmatched
from qlora.model.nf4 import BLOCK, Quantized, dequantize, quantize_rows
from qlora.numerics import Numerics
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step import experts as step_experts
from qlora.step.kernels import experts as kernels
from qlora.step.kernels import trial
from qlora.step.layerwise import set_gradient_checkpointing
from tests.families import make_model
from tests.mixtures import FAMILIES, VOCAB, make_config, narrow
from tests.model.mixture_cases import held

CPU = torch.device("cpu")
TOLERANCE = 1e-5
LORA = LoraSection(r=4)


def filled(weights: Tensor, quantization: QuantizationSection) -> Slab:
    slab = Slab(tuple(weights.shape), quantization)
    experts.fill(slab, lambda expert: lambda start, end: weights[expert][start:end], CPU)
    return slab


def as_blocks(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """The values of a weight, whose rows are taken to be its blocks: bitsandbytes' CPU kernel knows no others."""
    state = copy.deepcopy(quantized.state)
    state.shape = torch.Size((quantized.data.numel() * 2 // BLOCK, BLOCK))
    return dequantize(Quantized(quantized.data, state), dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 96, 64), (4, 48, 80), (2, 5, 64), (3, 512, 100)])
def test_each_expert_is_the_weight_that_nf4_makes_of_it(
    shape: tuple[int, int, int], kind: str, double_quant: bool
) -> None:
    """Rows of no multiple of 64 too, whose blocks run over the ends of rows."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    slab = filled(weights, QuantizationSection(type=kind, double_quant=double_quant))
    for dtype in (torch.float32, torch.bfloat16):
        together = slab.read(0, shape[0], dtype)
        for expert in range(shape[0]):
            alone = quantize_rows(
                lambda start, end, expert=expert: weights[expert][start:end], shape[1:], kind, double_quant, CPU
            )
            assert torch.equal(slab.codes[expert], alone.data.view(-1))
            assert torch.equal(as_blocks(alone, dtype).view(shape[1:]), together[expert])
            assert torch.equal(slab.read(expert, expert + 1, dtype)[0], together[expert])
        if shape[2] % BLOCK == 0:
            assert torch.equal(dequantize(alone, dtype), together[-1])
        off = (together.float() - weights.float()).abs().amax() / weights.float().abs().amax()
        assert off < 0.2  # half of the widest step of both types, and what rounding the constants adds


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_kernel_is_given_the_bits_that_are_read(kind: str, double_quant: bool) -> None:
    """More constants an expert than share a nested one, and no whole number of those."""
    weights = torch.randn((3, 272, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    slab = filled(weights, QuantizationSection(type=kind, double_quant=double_quant))
    assert isinstance(slab, step_experts.PackedStack) and kernels.fits(slab.shape, slab.block)
    about, ends = (272, 64, slab.block), torch.tensor([64, 128, 192]).int()
    found = kernels.grouped(torch.eye(64).repeat(3, 1), slab.packed(), ends, about, False)
    assert torch.equal(found.view(3, 64, 272).transpose(1, 2), slab.read(0, 3, torch.float32))


def test_who_multiplies_is_what_the_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new run's kernel where it runs; a run of a version that knew none goes on in chunks, and one whose kernel is
    not here as well."""
    mixture, dense = make_config("qwen3_moe").to_dict(), {"model_type": "llama", "num_hidden_layers": 1}
    assert experts.choose(mixture, CPU, None) == step_experts.IN_CHUNKS
    assert experts.choose(mixture, CPU, Numerics(experts=step_experts.IN_TRITON)) == step_experts.IN_CHUNKS
    monkeypatch.setattr(trial, "multiplies_experts", lambda device: True)
    assert experts.choose(mixture, CPU, None) == step_experts.IN_TRITON
    assert experts.choose(mixture, CPU, Numerics()) == step_experts.IN_CHUNKS
    assert experts.choose(mixture, CPU, Numerics(experts=step_experts.IN_TRITON)) == step_experts.IN_TRITON
    assert experts.choose(dense, CPU, None) is None


def test_what_the_kernel_does_not_fit_is_said() -> None:
    """Of a run by the kernel: blocks of 64 in rows of 32 (the down projection of tiny experts) run over their ends."""
    quantization, model = QuantizationSection(), make_model(make_config("qwen3_moe"))
    experts.hold(model, quantization)
    for by, said in ((step_experts.IN_TRITON, [2]), (step_experts.IN_CHUNKS, [])):
        experts.compute_by(model, by)
        found = experts.notices(model, quantization)
        assert [notice.count for notice in found if "kernel does not fit" in notice.message] == said


def test_slabs_are_multiplied_as_their_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided as they are made: a backward pass computes layers in a thread of its own, which knows of no run."""
    shape, quantization = (2, 64, 64), QuantizationSection()
    assert Slab(shape, quantization).by is None
    for said, by in ((step_experts.IN_TRITON, step_experts.IN_TRITON), (None, step_experts.IN_CHUNKS)):
        with numerics.in_force(Numerics(experts=said)):
            assert Slab(shape, quantization).by == by
    model = nn.ModuleList([Slab(shape, quantization), nn.Linear(2, 2)])
    experts.compute_by(model, step_experts.IN_TRITON)
    assert model[0].by == step_experts.IN_TRITON and not hasattr(model[1], "by")


def test_a_slab_has_4_127_bits_a_value() -> None:
    slab = Slab((8, 256, 64), QuantizationSection())
    assert slab.nbytes * 8 / (8 * 256 * 64) == pytest.approx(
        4.127, abs=0.07
    )  # and 1 KiB of tables, which real ones hide
    tables = slab.table.nbytes + slab.nested_table.nbytes
    assert (slab.nbytes - tables) * 8 / (8 * 256 * 64) == pytest.approx(
        4 + 8 / 64 + 32 / 64 / 256 + 32 / 256 / 64, abs=1e-9
    )


def test_a_slab_is_made_of_buffers_like_any_layer_s() -> None:
    """What moves a model, or asks it what is still without values, finds them; what is saved of it has none."""
    slab = filled(torch.randn(2, 64, 64), QuantizationSection())
    assert {name for name, _ in slab.named_buffers()} == {
        *("codes", "absmax", "nested_absmax", "offset", "table", "nested_table")
    }
    assert not slab.state_dict() and not list(slab.parameters())
    assert all(buffer.is_meta for buffer in slab.to("meta").buffers())


def with_adapters(model: Any) -> Any:
    """The model with adapters that are not zero, drawn in the order of their names."""
    tuned = adapters.attach(model.requires_grad_(False), LORA, 0, torch.float32, functions="peft").train()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapters.trainable(tuned).items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return tuned


def gradients(tuned: Any, seed: int = 1) -> list[Tensor]:
    """Logits, and the gradients of the inputs and of all adapters."""
    ids_BS = torch.randint(4, VOCAB, (2, 24), generator=torch.Generator().manual_seed(seed))
    hidden_BSD = tuned.get_input_embeddings()(ids_BS).detach().requires_grad_()
    logits = tuned(inputs_embeds=hidden_BSD, use_cache=False).logits
    factors = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    trained = list(adapters.trainable(tuned).values())
    for parameter in trained:
        parameter.grad = None
    (logits * factors).sum().backward()
    return [logits.detach(), hidden_BSD.grad, *(parameter.grad for parameter in trained)]


@pytest.mark.parametrize("shape", ["wide", "narrow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_experts_give_what_transformers_computes(family: str, shape: str) -> None:
    """Output, and gradients of inputs and adapters, in fp32; the same bits when recomputed, and when done again."""
    model, plain = map(with_adapters, held(make_config(family, narrow(family) if shape == "narrow" else None)))
    found, wanted = gradients(model), gradients(plain)
    assert len(found) > 10 and all(float(one.abs().max()) > 0 for one in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) <= TOLERANCE * float(other.abs().max())
    assert all(map(torch.equal, found, gradients(model)))
    set_gradient_checkpointing(model.get_base_model(), True, False)
    assert all(map(torch.equal, found, gradients(model)))


@pytest.mark.parametrize("family", ["phimoe", "mixtral"])
def test_a_frozen_router_draws_nothing_while_training(family: str) -> None:
    """Phi-3.5-MoE samples its experts in training, Mixtral's router may be given noise: recomputing would differ."""
    noise = {"router_jitter_noise": 0.3}
    model, _ = held(make_config(family, noise))
    ids_BS = torch.arange(4, 40)[None]
    with torch.no_grad():
        calm = model.eval()(input_ids=ids_BS, use_cache=False).logits
        assert torch.equal(calm, model.train()(input_ids=ids_BS, use_cache=False).logits)
        loose = make_model(make_config(family, noise)).train()
        assert not torch.equal(*(loose(input_ids=ids_BS, use_cache=False).logits for _ in range(2)))


def test_a_layer_around_experts_is_still_recomputed() -> None:
    """Gemma 4 has its experts in the layer itself, whose mode says whether it is computed anew."""
    model = build_unmatched(make_config("gemma4_text"), "eager", "base")
    routers = [name for name, one in model.named_modules() if one._forward_pre_hooks]
    assert routers and all(".router" in name for name in routers)


def test_experts_whose_values_fill_no_blocks_stay_in_16_bit_and_it_is_said() -> None:
    config = make_config("qwen3_moe", {"hidden_size": 20, "head_dim": 4, "moe_intermediate_size": 6})
    model = make_model(config)
    experts.hold(model, QuantizationSection())
    assert not any(isinstance(module, Slab) for module in model.modules())
    (notice,) = experts.notices(model, QuantizationSection())
    assert "no multiple of 64" in notice.message and notice.count == 4
    assert list(experts.notices(model, QuantizationSection(type="none"))) == []


def test_a_dense_model_is_left_as_it_is() -> None:
    from tests.families import make_config as make_dense

    model = make_model(make_dense("qwen3"))
    before = [name for name, _ in model.named_modules()]
    experts.hold(model, QuantizationSection())
    assert before == [name for name, _ in model.named_modules()]
    assert list(experts.notices(model, QuantizationSection())) == []


def test_what_bf16_computes_is_near_what_fp32_does() -> None:
    """The whole model in bf16, as it is trained: its products in the CPU's own way."""
    model, _ = held(make_config("qwen3_moe"))
    ids_BS = torch.arange(4, 40)[None]
    with torch.no_grad():
        exact = model(input_ids=ids_BS, use_cache=False).logits
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.bfloat16(), requires_grad=False)
        half = model(input_ids=ids_BS, use_cache=False).logits
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).abs().mean()) < 0.2 * float(exact.abs().mean())
