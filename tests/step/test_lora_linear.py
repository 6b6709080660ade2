"""The functions' gradients are those of what they compute, and a weight is asked for whenever it is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from qlora.step.lora_linear import MOST_RANK, Adapter, Frozen, Kernels, gated_mlp, recomputing, shared_input
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


@pytest.mark.parametrize("ranks", [(2, 3, 4), (MOST_RANK + 1, 3, 4)])
@pytest.mark.parametrize("kernels", list(Kernels))
def test_with_kernels_an_mlp_is_the_same_function(kernels: Kernels, ranks: tuple[int, int, int]) -> None:
    """Their twins, in float32; adapters of a high rank are added by products."""
    sizes = ((10, 6), (10, 6), (6, 10))
    low = [one.float() for one in weights_of(sizes)]
    x, *flat = (
        one.detach().float().requires_grad_()
        for one in (
            drawn(2, 3, 6),
            *(
                one
                for rank, (out, into) in zip(ranks, sizes, strict=True)
                for one in (drawn(rank, into), drawn(out, rank))
            ),
        )
    )
    layers = [layer(weight, scale) for weight, scale in zip(low, (0.5, 2.0, 1.5), strict=True)]
    pairs = [Adapter(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
    gate, up = (plainly(x, low[at], pairs[at], layers[at].scale) for at in range(2))
    right = plainly(silu(gate) * up, low[2], pairs[2], 1.5)
    found = gated_mlp(x, layers, pairs, torch.float32, kernels)
    assert (found - right).norm() <= 2e-6 * right.norm()
    results = (torch.autograd.grad(one.square().sum(), (x, *flat)) for one in (found, right))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 2e-6 * other.norm()
    with torch.no_grad():  # in which nothing is kept
        assert (gated_mlp(x, layers, pairs, torch.float32, kernels) - right).norm() <= 2e-6 * right.norm()


@pytest.mark.parametrize("kernels", list(Kernels))
def test_what_nobody_reads_is_not_computed(kernels: Kernels) -> None:
    """Gradients to the bit; of three weights the last is asked for once, going back."""
    sizes = ((10, 6), (10, 6), (6, 10))
    weights, x = [one.float() for one in weights_of(sizes)], drawn(3, 6).float().requires_grad_()
    flat = [one.detach().float().requires_grad_() for adapter in adapters_of(sizes) for one in adapter]
    pairs = [Adapter(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
    asked: list[int] = []
    layers = [Frozen(lambda at=at: asked.append(at) or weights[at], None, 0.5) for at in range(3)]  # type: ignore[misc, func-returns-value]
    found = []
    for unread in (False, True):
        with recomputing():
            output = gated_mlp(x, layers, pairs, torch.float32, kernels, unread)
        found.append(torch.autograd.grad(output, (x, *flat), torch.ones_like(output)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert sorted(asked) == [0] * 4 + [1] * 4 + [2] * 3
    outside = gated_mlp(x, layers, pairs, torch.float32, kernels, unread=True)
    assert torch.equal(outside, gated_mlp(x, layers, pairs, torch.float32, kernels))


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
    [
        ("peft", (94, 4.20e9), (217, 9.70e9)),
        ("qlora", (73, 3.15e9), (174, 7.63e9)),
        ("qlora in Triton", (44, 2.44e9), (103, 5.10e9)),
        ("qlora in Triton, fused", (32, 1.99e9), (76, 4.47e9)),
    ],
)
def test_a_layer_of_8b_has_its_ceilings(functions: str, forth: tuple[int, float], back: tuple[int, float]) -> None:
    """Rank 16, 2,048 tokens, with recomputation. What was counted at first, with peft's forward and the norms, masks
    and attention of then: 99 and 236 launches, 4.29 and 9.75 GB; at most half of it is wanted."""
    costs = layer_costs(functions)
    for cost, (launches, nbytes) in zip(costs, (forth, back), strict=True):
        assert 0.98 * launches <= cost.launches <= launches and 0.98 * nbytes <= cost.nbytes <= nbytes
    if functions.endswith("fused"):
        for cost, (launches, nbytes) in zip(costs, ((99, 4.29e9), (236, 9.75e9)), strict=True):
            assert cost.launches <= launches / 2 and cost.nbytes <= nbytes / 2


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
