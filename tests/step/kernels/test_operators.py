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


@pytest.mark.parametrize("keeps", [False, True])
def test_a_gated_product_with_its_adapters(keeps: bool) -> None:
    e, g, ups = drawn(5, 7), drawn(5, 7, seed=1), (drawn(7, 2, seed=2), drawn(7, 3, seed=3))
    lows = (drawn(5, 2, seed=4), drawn(5, 3, seed=5))
    whole = e + 0.5 * lows[0] @ ups[0].t(), g + 2.0 * lows[1] @ ups[1].t()
    before = e.clone(), g.clone()
    h = operators.gated_adapted(e, g, (*lows, *ups), (0.5, 2.0), keeps)
    torch.testing.assert_close(h, silu(whole[0]) * whole[1])
    for found, expected in zip((e, g), whole if keeps else before, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", operators.FORMS)
def test_what_is_turned_and_turned_back_is_itself(form: int) -> None:
    """By whole angles, in pairs; its gradient is the gradient turned back; columns without an angle stay."""
    q, k = (drawn(2, heads, 4, 10, seed=heads).double().requires_grad_() for heads in (3, 1))
    angles = drawn(2, 4, 3, seed=5).double()
    wide = torch.cat((angles, angles), dim=-1) if form != operators.NEIGHBOURS else angles.repeat_interleave(2, dim=-1)
    tables = wide.cos().float(), wide.sin().float()
    turned = operators.rope_qk(q.detach(), k.detach(), tables, form, False)
    pairs = [(0, 3), (1, 4), (2, 5)] if form == operators.HALVES else [(0, 1), (2, 3), (4, 5)]
    for x, to in zip((q, k), turned, strict=True):
        for at, (one, other) in enumerate(pairs):
            point = (
                torch.complex(x[..., one], x[..., other]) * torch.polar(torch.ones_like(angles), angles)[:, None, :, at]
            )
            torch.testing.assert_close(to[..., one], point.real, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(to[..., other], point.imag, atol=1e-6, rtol=1e-5)
        assert torch.equal(to[..., 6:], x[..., 6:]) and to.transpose(1, 2).is_contiguous()
    back = operators.rope_qk(*turned, tables, form, True)
    for found, expected in zip(back, (q, k), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("factor", "cap"), [(1.0, 0.0), (0.25, 0.0), (2.0, 5.0)])
def test_losses_and_their_gradients(factor: float, cap: float) -> None:
    logits, targets, weights = drawn(130, 11).requires_grad_(), torch.arange(130) % 11, drawn(130, seed=1).abs()
    z = logits * factor
    z = torch.tanh(z / cap) * cap if cap else z
    right = z.log_softmax(dim=-1)[torch.arange(130), targets]
    (expected,) = torch.autograd.grad(-(right * weights).sum(), logits)
    found = logits.detach().clone()
    torch.testing.assert_close(operators.cross_entropy_(found, targets, weights, factor, cap), right.detach())
    torch.testing.assert_close(found, expected)


def test_on_meta_they_make_what_a_card_makes() -> None:
    x, weight = torch.empty(4, 64, device="meta", dtype=torch.bfloat16), torch.empty(64, device="meta")
    y, inverse = operators.rms_norm(x, weight, 1e-5, False)
    assert (y.shape, y.dtype, inverse.shape, inverse.dtype) == (x.shape, x.dtype, (4,), torch.float32)
    assert operators.rms_norm_backward(y, x, weight, inverse, False).shape == x.shape
    assert operators.gated(x, x).dtype == x.dtype
    operators.gated_backward_(x, x.clone(), x.clone())
    low, up = torch.empty(4, 2, device="meta"), torch.empty(64, 2, device="meta")
    for keeps in (False, True):
        h = operators.gated_adapted(x, x.clone(), (low, low, up, up), (1.0, 1.0), keeps)
        assert (h.shape, h.dtype) == (x.shape, x.dtype)
    q, k, table = (torch.empty(shape, device="meta") for shape in ((2, 4, 3, 8), (2, 1, 3, 8), (1, 3, 8)))
    turned = operators.rope_qk(q, k, (table, table), operators.HALVES, False)
    assert [(one.shape, one.transpose(1, 2).is_contiguous()) for one in turned] == [(q.shape, True), (k.shape, True)]
    weights = torch.empty(4, device="meta")
    assert operators.cross_entropy_(x, torch.empty(4, device="meta").long(), weights, 1.0, 0.0).shape == (4,)
    tables = tuple(torch.empty(4, device="meta") for _ in range(5))
    assert operators.dequantize(x, tables, (8, 64), torch.float16).shape == (8, 64)
