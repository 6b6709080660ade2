"""An MLP over long rows, a tile of them at a time: what lies between its products never exists for all rows at once.

Whole, an MLP of (in D, inner F) keeps silu's and the product's two factors, 2 N F numbers, until its backward pass,
which makes N F more: of 32,768 tokens of an 8B model, 2.6 GiB. In tiles it keeps its input alone, and the backward pass
of a tile computes the two factors of that tile again. Each of the three weights is dequantized once a pass and held for
all tiles. The gradients of A and B are added up over the tiles in fp32, from the first tile to the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.step.lora_linear import (
    Adapter,
    Frozen,
    Kernels,
    _gated_backward,
    _gated_outputs,
    _Group,
    _How,
    is_recomputing,
)

# Of a tile. A product of 1,024 rows has 896 blocks of 128 x 128 for each F of 14,336, seven for each multiprocessor of
# an RTX 4090: taller ones would keep it no busier. Its inner tensors take 28 MiB each.
TILE_ROWS = 1024
LEAST_SAVED_BYTES = 128 << 20  # whole, fewer bytes than these are not worth another way to compute


def in_tiles(inputs: Tensor, inner: int, tile: int) -> bool:
    """Whether an MLP of F = `inner` goes through `inputs` (..., D) by a `tile` of rows.

    Whole, three tensors of N F live at the peak, beside one weight of D F; in tiles of T rows, three of T F beside
    three weights. Tiles are taken where they save half of the three tensors at least: 3 (N - T) - 2 D >= 3 N / 2.
    """
    width = inputs.shape[-1]
    rows = inputs.numel() // max(1, width)
    saved = 3 * (rows - tile) - 2 * width
    return 2 * saved >= 3 * rows and saved * inner * inputs.itemsize >= LEAST_SAVED_BYTES


def tiled_mlp(
    inputs: Tensor,
    layers: Sequence[Frozen],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    kernels: Kernels,
    unread: bool,
    tile: int,
) -> Tensor:
    """As `lora_linear.gated_mlp`, of `tile` rows at a time. Where what it gives is `unread`, nothing is computed."""
    flat = [tensor for adapter in adapters for tensor in adapter]
    x_ND = inputs.reshape(-1, inputs.shape[-1])
    how = _How(dtype, kernels, False, unread and is_recomputing())
    y_ND = _TiledMLP.apply(x_ND, tuple(layers), (how, tile), *flat)  # type: ignore[no-untyped-call]
    return y_ND.view(*inputs.shape[:-1], y_ND.shape[-1])  # type: ignore[no-any-return]


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, layers: Sequence[Frozen], about: tuple[_How, int], *flat: Tensor) -> Any:
        how, tile = about
        y_ND = x_ND.new_empty(len(x_ND), flat[5].shape[0])
        if not how.unread:
            first, down = _groups(layers, flat, how)
            for part in _tiles(len(x_ND), tile):
                h, *_ = _gated_outputs(first, x_ND[part], how)
                del _
                (y,), *_ = down.outputs(h, x_ND.dtype)
                y_ND[part] = y
                del h, y, _
        ctx.save_for_backward(x_ND, *flat)
        ctx.layers, ctx.about = layers, about
        return y_ND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x_ND, *flat = ctx.saved_tensors
        how, tile = ctx.about
        groups = _groups(ctx.layers, flat, how)
        sums = [torch.zeros_like(one, dtype=torch.float32) for one in flat]
        grad_x_ND = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        for part in _tiles(len(x_ND), tile):
            found, grad_x = _tile_gradients(groups, x_ND[part], gradient[part], how, grad_x_ND is not None)
            for total, one in zip(sums, found, strict=True):
                total += one
            if grad_x_ND is not None and grad_x is not None:
                grad_x_ND[part] = grad_x
            del found, grad_x
        return (grad_x_ND, None, None, *(total.to(one.dtype) for total, one in zip(sums, flat, strict=True)))


def _tile_gradients(
    groups: tuple[_Group, _Group], x: Tensor, gradient: Tensor, how: _How, goes_below: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Of the A and B of gate, up and down, and of x, by the rows of a tile."""
    first, down = groups
    e, g, lows = _factors(first, x, how)
    grads_y = [gradient.to(how.dtype)]
    grad_low_h = down.low_gradients(grads_y)
    grad_h = down.input_gradient(grads_y, grad_low_h)
    h, grad_e, grad_g = _gated_backward(grad_h, e, g, how.kernels)
    del grad_h, e, g
    of_down = down.adapter_gradients(grads_y, grad_low_h, h, down.lows(h))
    del h, grads_y
    grads = [grad_e, grad_g]
    del grad_e, grad_g
    grad_low = first.low_gradients(grads)
    of_first = first.adapter_gradients(grads, grad_low, x, lows)
    return [*of_first, *of_down], first.input_gradient(grads, grad_low) if goes_below else None


def _factors(first: _Group, x: Tensor, how: _How) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The outputs of gate and up, whole, and their x A'."""
    if how.kernels == Kernels.FUSED:
        _, (e, g), lows = _gated_outputs(first, x, how._replace(keeps=True))
    else:
        (e, g), lows = first.outputs(x.to(how.dtype), x.dtype)
    return e, g, lows


def _groups(layers: Sequence[Frozen], flat: Sequence[Tensor], how: _How) -> tuple[_Group, _Group]:
    """Gate and up, and down, with their weights as they are now, dequantized for all tiles."""
    held = [_holding(layer, layer.weight().to(how.dtype)) for layer in layers]
    first, down = _Group(held[:2], flat[:4], how.dtype, how.kernels), _Group(held[2:], flat[4:], how.dtype)
    first.kind = down.kind = how.dtype  # a tile's gradients are not rounded before they are added up
    return first, down


def _holding(layer: Frozen, weight: Tensor) -> Frozen:
    return layer._replace(weight=lambda: weight)


def _tiles(rows: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(rows, start + tile)) for start in range(0, rows, tile))
