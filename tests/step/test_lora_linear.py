"""The functions' gradients are those of what they compute, and a weight is asked for whenever it is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from qlora.step.lora_linear import Adapter, Frozen, gated_mlp, shared_input
from tests.step.launches import layer_costs

KIND = torch.float64
SIZES = ((10, 6), (4, 6), (4, 6))  # (out, in) of q, k and v


def drawn(*shape: int, seed: int = 0, trained: bool = False) -> Tensor:
    values = torch.randn(*shape, dtype=KIND, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.requires_grad_(trained)


def layer(weight: Tensor, scale: float, bias: Tensor | None = None) -> Frozen:
    return Frozen(lambda: weight, bias, scale)


def plainly(x: Tensor, weight: Tensor, adapter: Adapter, scale: float, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias) + scale * (x @ adapter.A.t() @ adapter.B.t())


def adapters_of(sizes: tuple[tuple[int, int], ...]) -> list[Adapter]:
    """Of another rank each."""
    ranks = range(2, 2 + len(sizes))
    return [
        Adapter(drawn(rank, into, seed=rank, trained=True), drawn(out, rank, seed=9 + rank, trained=True))
        for rank, (out, into) in zip(ranks, sizes, strict=True)
    ]


def weights_of(sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    return [drawn(*size, seed=at) for at, size in enumerate(sizes)]


@pytest.mark.parametrize("count", [1, 3])
def test_layers_of_one_input_are_the_layers_one_by_one(count: int) -> None:
    sizes = SIZES[:count]
    weights, adapters, x = weights_of(sizes), adapters_of(sizes), drawn(2, 3, 6, trained=True)
    scales, biases = (
        (0.5, 2.0, 1.0)[:count],
        [drawn(out, seed=3) if at == 0 else None for at, (out, _) in enumerate(sizes)],
    )
    layers = [layer(*of_one) for of_one in zip(weights, scales, biases, strict=True)]
    flat = [tensor for adapter in adapters for tensor in adapter]

    def ours(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return shared_input(x, layers, [Adapter(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)], KIND)

    expected = [plainly(x, *of_one) for of_one in zip(weights, adapters, scales, biases, strict=True)]
    for found, right in zip(ours(x, *flat), expected, strict=True):
        torch.testing.assert_close(found, right)
    assert torch.autograd.gradcheck(ours, (x, *flat))


def test_an_mlp_is_its_layers_one_by_one() -> None:
    sizes = ((10, 6), (10, 6), (6, 10))
    weights, adapters, x = weights_of(sizes), adapters_of(sizes), drawn(2, 3, 6, trained=True)
    layers = [layer(weight, scale) for weight, scale in zip(weights, (0.5, 2.0, 1.5), strict=True)]
    flat = [tensor for adapter in adapters for tensor in adapter]

    def ours(x: Tensor, *flat: Tensor) -> Tensor:
        return gated_mlp(x, layers, [Adapter(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)], KIND)

    gate, up = (plainly(x, weights[at], adapters[at], layers[at].scale) for at in range(2))
    torch.testing.assert_close(ours(x, *flat), plainly(silu(gate) * up, weights[2], adapters[2], 1.5))
    assert torch.autograd.gradcheck(ours, (x, *flat))


def gradients(work: Callable[[], Tensor], *wanted: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(work().square().sum(), wanted)


def test_an_input_that_is_not_trained_gets_no_gradient() -> None:
    """The first layer's: a third of its products."""
    asked = []
    weight, (adapter,) = drawn(10, 6), adapters_of(SIZES[:1])
    counted = Frozen(lambda: asked.append(1) or weight, None, 1.0)  # type: ignore[func-returns-value]
    found = gradients(lambda: shared_input(drawn(3, 6), [counted], [adapter], KIND)[0], *adapter)
    right = gradients(lambda: plainly(drawn(3, 6), weight, adapter, 1.0), *adapter)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)
    assert len(asked) == 1


@pytest.mark.parametrize("is_mlp", [False, True])
def test_a_weight_may_be_elsewhere_between_forward_and_backward(is_mlp: bool) -> None:
    sizes = ((10, 6), (10, 6), (6, 10)) if is_mlp else SIZES
    weights, adapters, x = weights_of(sizes), adapters_of(sizes), drawn(3, 6, trained=True)
    there = {at: weight.clone() for at, weight in enumerate(weights)}
    layers = [Frozen(lambda at=at: there[at], None, 0.5) for at in there]  # type: ignore[misc]
    run = gated_mlp if is_mlp else shared_input
    wanted = (x, *(tensor for adapter in adapters for tensor in adapter))

    def loss() -> Tensor:
        outputs = run(x, layers, adapters, KIND)
        return sum(one.square().sum() for one in ((outputs,) if is_mlp else outputs))  # type: ignore[misc, return-value]

    right = torch.autograd.grad(loss(), wanted)
    output = loss()
    for weight in there.values():
        weight.fill_(float("nan"))  # whoever kept the tensor has this
    there.update(enumerate(weights))
    for one, other in zip(torch.autograd.grad(output, wanted), right, strict=True):
        assert torch.equal(one, other)


def test_products_in_float32_are_rounded_once() -> None:
    """bf16 on a processor without bf16 products: nearer to the truth than product, adapter and sum rounded apart."""
    weight, (adapter,), x = drawn(64, 96), adapters_of(((64, 96),)), drawn(40, 96)
    low = [tensor.detach().bfloat16() for tensor in (weight, *adapter, x)]
    truth = plainly(low[3].double(), low[0].double(), Adapter(low[1].double(), low[2].double()), 2.0)
    ours = shared_input(low[3], [Frozen(lambda: low[0], None, 2.0)], [Adapter(low[1], low[2])], torch.float32)[0]
    assert ours.dtype == torch.bfloat16
    assert (
        torch.equal(ours, truth.bfloat16())
        or (ours.double() - truth).norm() < 1.001 * (truth.bfloat16() - truth).norm()
    )


@pytest.mark.parametrize(
    ("functions", "forth", "back"),
    [("qlora", (73, 3.15e9), (178, 7.97e9)), ("qlora in Triton", (44, 2.44e9), (105, 5.42e9))],
)
def test_a_layer_of_8b_has_its_ceilings(functions: str, forth: tuple[int, float], back: tuple[int, float]) -> None:
    """Rank 16, 2,048 tokens, with recomputation. With peft's forward: 94 and 213 launches, 4.20 and 9.54 GB."""
    for cost, (launches, nbytes) in zip(layer_costs(functions), (forth, back), strict=True):
        assert cost.launches <= launches and cost.nbytes <= nbytes


def test_outputs_may_be_changed_in_their_own_place() -> None:
    """As OLMo caps q, k and v, and Falcon adds to what its MLP gave."""
    sizes = ((6, 6), (6, 6), (6, 6))
    layers, adapters, x = [layer(one, 0.5) for one in weights_of(sizes)], adapters_of(sizes), drawn(2, 3, 6)
    flat = [tensor for adapter in adapters for tensor in adapter]

    def gradients(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        outputs = (*shared_input(x, layers, adapters, KIND), gated_mlp(x, layers, adapters, KIND))
        return list(torch.autograd.grad(sum(change(output).square().sum() for output in outputs), flat))

    for found, right in zip(
        gradients(lambda y: y.clamp_(-0.5, 0.5)), gradients(lambda y: y.clamp(-0.5, 0.5)), strict=True
    ):
        assert torch.equal(found, right)


def test_an_expert_that_no_token_goes_to_gives_nothing() -> None:
    sizes = ((6, 6), (6, 6), (6, 6))
    layers, adapters, x = [layer(one, 0.5) for one in weights_of(sizes)], adapters_of(sizes), drawn(0, 6, trained=True)
    outputs = (*shared_input(x, layers, adapters, KIND), gated_mlp(x, layers, adapters, KIND))
    assert all(output.shape == (0, 6) for output in outputs)
    sum(output.sum() for output in outputs).backward()  # type: ignore[union-attr]
    assert all(not one.grad.any() for adapter in adapters for one in adapter)  # type: ignore[union-attr]
