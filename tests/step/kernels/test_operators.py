"""The operators' twins in plain torch, which say what each kernel computes; and what a dispatch mode sees of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from qlora.model.nf4 import Quantized, dequantize, quantize_rows
from qlora.step.kernels import operators

KIND = torch.float32


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_gated_product_and_its_gradients() -> None:
    e, g, grad = (drawn(5, 7, seed=seed).requires_grad_(seed < 2) for seed in range(3))
    right = silu(e) * g
    of_e, of_g = torch.autograd.grad(right, (e, g), grad)
    e, g = e.detach(), g.detach()
    torch.testing.assert_close(operators.gated(e, g), right.detach())
    operators.gated_backward_(grad, e, g)
    for found, expected in ((grad, right.detach()), (e, of_e), (g, of_g)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("from_one", [False, True])
def test_a_norm_and_its_gradient(from_one: bool) -> None:
    x, weight, grad = drawn(4, 6).requires_grad_(), drawn(6, seed=1), drawn(4, 6, seed=2)
    right = rms_norm(x, (6,), weight + from_one, eps=1e-3)
    (of_x,) = torch.autograd.grad(right, x, grad)
    found, inverse = operators.rms_norm(x.detach(), weight, 1e-3, from_one)
    torch.testing.assert_close(found, right.detach())
    torch.testing.assert_close(operators.rms_norm_backward(grad, x.detach(), weight, inverse, from_one), of_x)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 448), (3, 64)])
def test_a_weight_is_bitsandbytes_to_the_bit(shape: tuple[int, int], kind: torch.dtype) -> None:
    weight = drawn(*shape).bfloat16()
    quantized = quantize_rows(lambda start, end: weight[start:end], shape, "nf4", True, torch.device("cpu"))
    state = quantized.state
    tables = (state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset)
    found = operators.dequantize(quantized.data, tables, shape, kind)
    assert found.dtype == kind and torch.equal(found, dequantize(Quantized(quantized.data, state), kind))


def test_on_meta_they_make_what_a_card_makes() -> None:
    x, weight = torch.empty(4, 64, device="meta", dtype=torch.bfloat16), torch.empty(64, device="meta")
    y, inverse = operators.rms_norm(x, weight, 1e-5, False)
    assert (y.shape, y.dtype, inverse.shape, inverse.dtype) == (x.shape, x.dtype, (4,), torch.float32)
    assert operators.rms_norm_backward(y, x, weight, inverse, False).shape == x.shape
    assert operators.gated(x, x).dtype == x.dtype
    operators.gated_backward_(x, x.clone(), x.clone())
    tables = tuple(torch.empty(4, device="meta") for _ in range(5))
    assert operators.dequantize(x, tables, (8, 64), torch.float16).shape == (8, 64)
