"""An MLP in tiles gives what it gives whole, keeps its input alone, and asks for each weight once a pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qlora.memory.trace import LiveBytes
from qlora.step.lora_linear import Adapter, Frozen, Kernels, gated_mlp, recomputing
from qlora.step.tiled_mlp import TILE_ROWS, in_tiles, tiled_mlp

META = torch.device("meta")
WIDTH, INNER, RANK = 48, 112, 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


SIZES = ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
WEIGHTS = [drawn(*size, seed=at) for at, size in enumerate(SIZES)]
PAIRS = [(drawn(RANK, into, seed=10 + at), drawn(out, RANK, seed=20 + at)) for at, (out, into) in enumerate(SIZES)]


class Counted:
    """A layer whose weight is asked for."""

    def __init__(self, weight: Tensor, asked: list[int], number: int) -> None:
        self.weight, self.asked, self.number = weight, asked, number

    def __call__(self) -> Tensor:
        self.asked.append(self.number)
        return self.weight.clone()


def run(
    rows: int, tile: int | None, kind: torch.dtype, dtype: torch.dtype, kernels: Kernels = Kernels.NONE
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Output, gradients of x and of A, B, A, B, …, and which weights were asked for."""
    asked: list[int] = []
    layers = [Frozen(Counted(one.to(kind), asked, at), None, 1.5) for at, one in enumerate(WEIGHTS)]
    adapters = [Adapter(*(one.to(kind).clone().requires_grad_() for one in pair)) for pair in PAIRS]
    x = drawn(2, rows // 2, WIDTH, seed=1).to(kind).clone().requires_grad_()
    if tile is None:
        y = gated_mlp(x, layers, adapters, dtype, kernels)
    else:
        y = tiled_mlp(x, layers, adapters, dtype, kernels, False, tile)
    weights = drawn(*y.shape, seed=2).to(kind)
    (y * weights).sum().backward()
    trained = [x, *(one for adapter in adapters for one in adapter)]
    assert all(one.grad is not None and one.grad.dtype == kind for one in trained)
    return y.detach(), [one.grad for one in trained if one.grad is not None], asked


def apart(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    one, other = (torch.cat([each.double().flatten() for each in tensors]) for tensors in (found, right))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kernels", Kernels)
@pytest.mark.parametrize("tile", [1, 16, 30, 64, 100])
def test_the_numbers_of_the_whole(tile: int, kernels: Kernels) -> None:
    """The last tile is shorter, or longer than all rows."""
    whole, right, _ = run(64, None, torch.float32, torch.float32, kernels)
    output, found, asked = run(64, tile, torch.float32, torch.float32, kernels)
    torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-6)
    assert all(apart([one], [other]) <= 1e-6 for one, other in zip(found, right, strict=True))
    assert asked == [0, 1, 2, 0, 1, 2], "each weight once a pass"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_bf16_no_farther_from_the_truth(dtype: torch.dtype) -> None:
    """Gradients of many tiles, summed in fp32 and rounded once."""
    _, truth, _ = run(512, None, torch.float64, torch.float64)
    whole, tiled = (apart(run(512, tile, torch.bfloat16, dtype)[1][1:], truth[1:]) for tile in (None, 32))
    assert tiled <= 1.05 * whole


def test_an_input_that_is_not_trained_gets_no_gradient() -> None:
    layers = [Frozen(Counted(one.float(), [], at), None, 1.5) for at, one in enumerate(WEIGHTS)]
    adapters = [Adapter(*(one.float().requires_grad_() for one in pair)) for pair in PAIRS]
    y = tiled_mlp(drawn(8, WIDTH, seed=1).float(), layers, adapters, torch.float32, Kernels.NONE, False, 3)
    y.sum().backward()
    assert all(one.grad is not None for adapter in adapters for one in adapter)


def test_no_rows_give_nothing() -> None:
    layers = [Frozen(Counted(one.float(), [], at), None, 1.5) for at, one in enumerate(WEIGHTS)]
    adapters = [Adapter(*(one.float().requires_grad_() for one in pair)) for pair in PAIRS]
    y = tiled_mlp(torch.zeros(0, WIDTH, requires_grad=True), layers, adapters, torch.float32, Kernels.NONE, False, 3)
    y.sum().backward()
    assert y.shape == (0, WIDTH) and all(not one.grad.any() for adapter in adapters for one in adapter)  # type: ignore[union-attr]


def test_where_nobody_reads_what_it_gives_nothing_is_computed() -> None:
    """While a layer is computed once more; its gradients are what they are."""
    asked: list[int] = []
    layers = [Frozen(Counted(one.float(), asked, at), None, 1.5) for at, one in enumerate(WEIGHTS)]
    adapters = [Adapter(*(one.float().requires_grad_() for one in pair)) for pair in PAIRS]
    x, gradient = (drawn(40, WIDTH, seed=at).float() for at in (1, 2))
    found = []
    for unread in (True, False):
        with recomputing():
            y = tiled_mlp(x.requires_grad_(), layers, adapters, torch.float32, Kernels.NONE, unread, 16)
        assert len(asked) == (0 if unread else 3)
        found.append(torch.autograd.grad(y, [x, *(one for adapter in adapters for one in adapter)], gradient))
        asked.clear()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    y = tiled_mlp(x, layers, adapters, torch.float32, Kernels.NONE, True, 16)
    assert asked == [0, 1, 2] and y.isfinite().all(), "outside of it somebody reads it"


def inner_bytes(rows: int, width: int, inner: int, tile: int | None) -> tuple[int, int]:
    """At the peak of forward and backward, on meta tensors: what lives beside x, y and their gradients."""
    sizes = ((inner, width), (inner, width), (width, inner))
    live = LiveBytes("cuda")

    def made(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=META)

    with live:
        live.begin("forward")
        x, gradient = made(rows, width).requires_grad_(), made(rows, width)
        adapters = [Adapter(made(16, into).requires_grad_(), made(out, 16).requires_grad_()) for out, into in sizes]
        layers = [Frozen(lambda size=size: made(*size), None, 1.0) for size in sizes]  # type: ignore[misc]
        how = (layers, adapters, torch.bfloat16, Kernels.FUSED, False)
        y = gated_mlp(x, *how) if tile is None else tiled_mlp(x, *how, tile)
        live.begin("backward")
        torch.autograd.grad(y, [x, *(one for adapter in adapters for one in adapter)], gradient)
    return live.peaks["forward"].total - 3 * x.nbytes, live.peaks["backward"].total - 4 * x.nbytes


@pytest.mark.parametrize("rows", [8192, 32768])
def test_what_an_mlp_of_8b_takes(rows: int) -> None:
    """Whole 0.66 and 2.6 GiB and one weight; in tiles three weights and four tensors of a tile, whatever the rows."""
    width, inner, adapters = 4096, 14336, 16 << 20  # of rank 16, x A' of a tile, gradients and their sums in fp32
    whole, tiled = (inner_bytes(rows, width, inner, tile) for tile in (None, TILE_ROWS))
    assert max(whole) >= 3 * rows * inner * 2
    assert max(tiled) <= (3 * width + 4 * TILE_ROWS) * inner * 2 + adapters


def test_tiles_are_for_long_rows() -> None:
    def asks(rows: int, width: int, inner: int, kind: torch.dtype = torch.bfloat16) -> bool:
        return in_tiles(torch.empty(1, rows, width, dtype=kind, device=META), inner, TILE_ROWS)

    assert [asks(rows, 4096, 14336) for rows in (2048, 4096, 7509, 7510, 32768)] == [False, False, False, True, True]
    assert not asks(8192, 576, 1536) and asks(32768, 576, 1536), "a 135M base: 59 MiB, 279 MiB"
    assert not asks(50_000, 64, 128, torch.float32), "no small model's"
