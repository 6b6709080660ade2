"""The split product of experts and their adapters against one dense weight an expert, W + s B A, by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.memory.trace import LiveBytes
from qlora.step.expert_lora import AdaptedLinear, Factors, How
from qlora.step.experts import Routing

COUNT, RANK, SCALE = 5, 3, 1.75
ROUTINGS = {
    "even": torch.stack((torch.arange(20) % 5, (torch.arange(20) + 2) % 5), dim=1),
    "skewed, and experts without a row": torch.tensor([[3, 1]] * 11 + [[1, 3]]),
    "one token": torch.tensor([[2, 4]]),
}


def made(width: int, out: int, rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Weights, A, B, inputs, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(COUNT, out, width), (COUNT, RANK, width), (COUNT, RANK, out), (rows, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("spread", [True, False], ids=["tokens", "rows"])
@pytest.mark.parametrize(("width", "out"), [(6, 9), (9, 4)])
@pytest.mark.parametrize("name", ROUTINGS)
def test_it_is_the_dense_sum_and_its_gradients(name: str, width: int, out: int, spread: bool) -> None:
    routing = Routing(ROUTINGS[name], COUNT)
    tokens = len(ROUTINGS[name])
    W, A, B, inputs = made(width, out, tokens if spread else routing.rows)
    gradient = torch.randn(routing.rows, out, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for dense in (False, True):
        one, two, given = (tensor.clone().requires_grad_() for tensor in (A, B, inputs))
        if dense:
            rows = given[routing.order_S // 2] if spread else given
            summed = W + SCALE * torch.einsum("ero,eri->eoi", two, one)
            y = torch.einsum("si,soi->so", rows, summed[routing.expert_S])
        else:
            y = AdaptedLinear.apply(given, one, two, How(Factors(W), routing, torch.float64, SCALE, spread))
        y.backward(gradient)
        found.append([y.detach(), given.grad, one.grad, two.grad])
    for mine, wanted in zip(*found, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-12, atol=1e-12)
    hit = set(ROUTINGS[name].flatten().tolist())
    for of_expert in found[0][2:]:
        assert {number for number in range(COUNT) if bool(of_expert[number].any())} == hit


def test_bf16_is_computed_in_the_type_of_products_and_given_back_in_its_own() -> None:
    routing = Routing(ROUTINGS["even"], COUNT)
    W, A, B, inputs = made(6, 9, 20, torch.bfloat16)
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        one, two, given = (tensor.clone().requires_grad_() for tensor in (A, B, inputs))
        y = AdaptedLinear.apply(given, one, two, How(Factors(W), routing, dtype, SCALE, True))
        y.sum().backward()
        assert {tensor.dtype for tensor in (y, given.grad, one.grad, two.grad)} == {torch.bfloat16}
        values[dtype] = y.float()
    assert torch.allclose(values[torch.float32], values[torch.bfloat16], rtol=0.05, atol=0.3)


def test_inputs_that_nothing_goes_back_to_ask_for_no_weights() -> None:
    routing, asked = Routing(ROUTINGS["even"], COUNT), []
    W, A, B, inputs = made(6, 9, 20)

    class Watched(Factors):
        def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
            asked.append((first, last))
            return super().read(first, last, dtype)

    y = AdaptedLinear.apply(
        inputs, A.requires_grad_(), B.requires_grad_(), How(Watched(W), routing, W.dtype, 1.0, True)
    )
    before = len(asked)
    y.sum().backward()
    assert before and len(asked) == before and A.grad is not None


def kept(spread: bool) -> tuple[list[tuple[int, ...]], Any]:
    routing = Routing(ROUTINGS["even"], COUNT)
    W, A, B, inputs = made(6, 9, 20 if spread else 40)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: shapes.append(tuple(one.shape)) or one, lambda one: one):
        trained = (inputs.requires_grad_(), A.requires_grad_(), B.requires_grad_())
        y = AdaptedLinear.apply(*trained, How(Factors(W), routing, W.dtype, 1.0, spread))
    return shapes, y


def test_nothing_is_kept_but_inputs_and_what_is_as_narrow_as_the_rank() -> None:
    """Of tokens their own hidden states, not those of each of their experts; no sum of W and B A, no dense delta."""
    assert sorted(kept(True)[0]) == sorted([(20, 6), (40, RANK), (COUNT, RANK, 6), (COUNT, RANK, 9)])
    assert sorted(kept(False)[0]) == sorted([(40, 6), (40, RANK), (COUNT, RANK, 6), (COUNT, RANK, 9)])


def test_a_step_on_meta_takes_what_it_takes_on_tensors() -> None:
    """The estimator runs the same code: the peak of both passes by the counter, on meta and on the CPU."""
    peaks = []
    for device in ("cpu", "meta"):
        with LiveBytes("cpu") as live:
            index_TK = ROUTINGS["even"].repeat(13, 1)[:256].to(device)
            W, A, B, inputs = (tensor.to(device) for tensor in made(512, 384, 256, torch.float32))
            live.begin("pass")
            routing = Routing(index_TK, COUNT)
            y = AdaptedLinear.apply(
                inputs.requires_grad_(),
                A.requires_grad_(),
                B.requires_grad_(),
                How(Factors(W), routing, torch.float32, 1.0, True),
            )
            y.backward(torch.empty_like(y))
            peaks.append(live.peaks["pass"].total)
            del W, A, B, inputs, index_TK, routing, y
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)
