"""bf16 products on CPUs without bf16 kernels: the same values but for the order of sums, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qlora.model import cpu_matmul, nf4
from qlora.model.four_bit_layers import set_4bit
from qlora.third_party import import_bitsandbytes
from tests.model.nf4_reference import quantize

CPU = torch.device("cpu")


def work() -> list[torch.Tensor]:
    """A linear layer, a batched product and attention with a mask, and their gradients."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in ((40, 64), (32, 64)))
    q = torch.randn(2, 4, 24, 16, generator=generator).bfloat16().requires_grad_()
    mask = torch.zeros(24, 24, dtype=torch.bfloat16).masked_fill(torch.ones(24, 24).triu(1).bool(), float("-inf"))
    out = torch.nn.functional.linear(x, w)
    attended = [scaled_dot_product_attention(q, q, q, is_causal=True), scaled_dot_product_attention(q, q, q, mask)]
    product = torch.bmm(q[0], q[0].transpose(1, 2))
    sum(t.float().square().mean() for t in (out, product, *attended)).backward()
    return [t.detach() for t in (out, product, *attended, x.grad, w.grad, q.grad)]


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "has_bf16_products", lambda: False)


def test_values_and_gradients_are_the_same(without_kernels: None) -> None:
    plain = work()
    with cpu_matmul.fast_matmul(CPU):
        fast = work()
    for one, other in zip(plain, fast, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        scale = float(one.float().abs().max())
        assert float((one.float() - other.float()).abs().max()) <= 0.02 * scale  # a few steps of bf16 (2^-8)


def test_products_really_run_in_fp32(without_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And fp32 products are not touched."""
    seen: list[torch.dtype] = []
    wide = cpu_matmul._wide

    def remember(value: object) -> object:
        widened = wide(value)
        if isinstance(widened, torch.Tensor):
            seen.append(widened.dtype)
        return widened

    monkeypatch.setattr(cpu_matmul, "_wide", remember)
    with cpu_matmul.fast_matmul(CPU):
        torch.ones(4, 4, dtype=torch.bfloat16) @ torch.ones(4, 4, dtype=torch.bfloat16)
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("nested", [True, False])
def test_a_4bit_layer_computes_with_the_same_rounded_weight(without_kernels: None, nested: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 128, generator=generator).bfloat16()
    layer = import_bitsandbytes().nn.Linear4bit(128, 64, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False
    quantized = quantize(weight, "nf4", nested, CPU)
    set_4bit(layer, quantized)
    layer.bias = torch.nn.Parameter(torch.randn(64, generator=generator).bfloat16())
    inputs = torch.randn(9, 128, generator=generator).bfloat16().requires_grad_()
    with cpu_matmul.fast_matmul(CPU):
        out = layer(inputs)
        out.float().sum().backward()
    dequantized = nf4.dequantize(quantized, torch.bfloat16).float()
    assert torch.equal(out, (inputs.float() @ dequantized.T + layer.bias.float()).bfloat16())
    assert torch.equal(inputs.grad, (torch.ones(9, 64) @ dequantized).bfloat16())


def test_nothing_changes_where_there_are_kernels_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "has_bf16_products", lambda: True)
    with cpu_matmul.fast_matmul(CPU):
        assert all(torch.equal(a, b) for a, b in zip(work(), work(), strict=True))
    monkeypatch.setattr(cpu_matmul, "has_bf16_products", lambda: False)
    with cpu_matmul.fast_matmul(torch.device("cuda")):
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_other_dtypes_are_left_alone(without_kernels: None) -> None:
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    with cpu_matmul.fast_matmul(CPU):
        assert torch.equal(a @ b, torch.mm(a, b))
        assert (a.double() @ b.double()).dtype == torch.float64


def test_a_card_adds_up_in_fp32_while_a_run_lasts() -> None:
    with cpu_matmul.fast_matmul(torch.device("cuda", 0)):
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
