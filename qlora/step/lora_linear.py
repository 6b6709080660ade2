"""Frozen linear layers with low-rank adapters beside them, as one function of autograd each.

y = x W' + s (x A') B', the adapter's share added in the product's own place: no copy of the output, no scaled one, no
sum (peft's forward reads and writes every output seven times). What is kept for the backward pass is the input, x A'
(r wide), and for an MLP the outputs of gate and up; their product is computed again. Layers that share an input add its
gradients up in one buffer, and read it once for the gradients of all their A. W is dequantized where it is used and
dropped behind it, and it is asked for anew in the backward pass: between the two it may have been somewhere else.

Products are computed in `dtype`: that of the inputs, or float32 where a CPU multiplies bf16 number by number; then
weight and adapter are added up before they are rounded once.

Whoever computes a layer a second time to go back through it (`recomputing`) needs what functions keep, and of what an
MLP gives nothing, if its layer only adds it to its own output: then down's product, a fifth of the second computation,
is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from qlora.step.kernels import operators


class Frozen(NamedTuple):
    """What of a layer is not trained, for one call.

    weight  gives W (out, in), in the type of the inputs, whenever it is called
    bias    (out,) or None
    scale   s, the factor of the adapter
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    scale: float


class Adapter(NamedTuple):
    """A (r, in) and B (out, r), in the type of the inputs."""

    A: Tensor
    B: Tensor


class Kernels(IntEnum):
    """What lies between products: in torch, in kernels (`step/kernels`), or in kernels that do several at once."""

    NONE = 0
    SINGLE = 1
    FUSED = 2


# Of adapters whose share a kernel adds as outer products. With 64 they are 7.5 GFLOP of a layer of 8B (2,048 tokens):
# 0.09 ms of an RTX 4090 (82 TFLOP/s), on which the 118 MB that need not be moved take 0.12 ms (1 TB/s).
MOST_RANK = 64
_RECOMPUTING: ContextVar[bool] = ContextVar("qlora_recomputing", default=False)


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside the block a layer is computed once more, to go back through it: nobody reads what it gives."""
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def is_recomputing() -> bool:
    return _RECOMPUTING.get()


def shared_input(
    inputs: Tensor,
    layers: Sequence[Frozen],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    kernels: Kernels = Kernels.NONE,
) -> tuple[Tensor, ...]:
    """The outputs (..., out) of one layer, or of several, such as q, k and v, that take the same `inputs` (..., in).

    Models change them in their own places (OLMo caps q, k and v, Falcon adds to an MLP's), which autograd refuses of
    views made inside of a function: here they get their shape outside of it.
    """
    flat = [tensor for adapter in adapters for tensor in adapter]
    outputs = _SharedInput.apply(_rows(inputs), tuple(layers), (dtype, kernels), *flat)  # type: ignore[no-untyped-call]
    return tuple(output.view(*inputs.shape[:-1], output.shape[-1]) for output in outputs)


def gated_mlp(
    inputs: Tensor,
    layers: Sequence[Frozen],
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    kernels: Kernels = Kernels.NONE,
    unread: bool = False,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of `inputs` (..., in); `layers` are gate, up and down (Shazeer 2020, section 2).

    `unread`: while `recomputing`, nobody reads the values of what is given back, which then are any.
    """
    flat = [tensor for adapter in adapters for tensor in adapter]
    how = _How(dtype, kernels, torch.is_grad_enabled(), unread and is_recomputing())
    y_ND = _GatedMLP.apply(_rows(inputs), tuple(layers), how, *flat)  # type: ignore[no-untyped-call]
    return y_ND.view(*inputs.shape[:-1], y_ND.shape[-1])  # type: ignore[no-any-return]


class _How(NamedTuple):
    """`keeps`: what the backward pass needs is kept; `unread`: what is given back is not."""

    dtype: torch.dtype
    kernels: Kernels
    keeps: bool
    unread: bool


def _rows(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, inputs.shape[-1])


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, layers: Sequence[Frozen], how: Any, *flat: Tensor) -> Any:
        dtype, kernels = how
        group = _Group(layers, flat, dtype, kernels)
        outputs, lows = group.outputs(x_ND.to(dtype), x_ND.dtype)
        ctx.save_for_backward(x_ND, *lows, *flat)
        ctx.layers, ctx.dtype = layers, dtype
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_ND, *rest = ctx.saved_tensors
        lows, flat = rest[: len(ctx.layers)], rest[len(ctx.layers) :]
        group = _Group(ctx.layers, flat, ctx.dtype)
        grads_y = [gradient.to(ctx.dtype) for gradient in gradients]
        grad_low_NR = group.low_gradients(grads_y)
        found = group.adapter_gradients(grads_y, grad_low_NR, x_ND, lows)
        grad_x = group.input_gradient(grads_y, grad_low_NR) if ctx.needs_input_grad[0] else None
        grad_x = None if grad_x is None else grad_x.to(x_ND.dtype)
        return (grad_x, None, None, *found)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, layers: Sequence[Frozen], how: _How, *flat: Tensor) -> Any:
        dtype, kernels = how.dtype, how.kernels
        first, down = _Group(layers[:2], flat[:4], dtype, kernels), _Group(layers[2:], flat[4:], dtype)
        h_NF, (e_NF, g_NF), lows = _gated_outputs(first, x_ND, how)
        if how.unread:
            y_ND, lows_h = x_ND.new_empty(len(x_ND), flat[5].shape[0]), down.lows(h_NF)
        else:
            (y_ND,), lows_h = down.outputs(h_NF, x_ND.dtype)
        ctx.save_for_backward(x_ND, e_NF, g_NF, *lows, *lows_h, *flat)
        ctx.layers, ctx.dtype, ctx.kernels = layers, dtype, kernels
        return y_ND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x_ND, e_NF, g_NF, low_e, low_g, low_h, *flat = ctx.saved_tensors
        first, down = _Group(ctx.layers[:2], flat[:4], ctx.dtype), _Group(ctx.layers[2:], flat[4:], ctx.dtype)
        grads_y = [gradient.to(ctx.dtype)]
        grad_low_h = down.low_gradients(grads_y)
        grad_h = down.input_gradient(grads_y, grad_low_h)
        h_NF, grad_e, grad_g = _gated_backward(grad_h, e_NF, g_NF, ctx.kernels)
        del grad_h, e_NF, g_NF
        of_down = down.adapter_gradients(grads_y, grad_low_h, h_NF, [low_h])
        del h_NF, grads_y
        grads = [grad_e, grad_g]
        del grad_e, grad_g
        grad_low_NR = first.low_gradients(grads)
        of_first = first.adapter_gradients(grads, grad_low_NR, x_ND, [low_e, low_g])
        grad_x = first.input_gradient(grads, grad_low_NR) if ctx.needs_input_grad[0] else None
        grad_x = None if grad_x is None else grad_x.to(x_ND.dtype)
        return (grad_x, None, None, *of_first, *of_down)


class _Group:
    """Layers that are given the same x (N, in), with their adapters `flat` (A, B, A, B, …), and their products."""

    def __init__(
        self, layers: Sequence[Frozen], flat: Sequence[Tensor], dtype: torch.dtype, kernels: Kernels = Kernels.NONE
    ) -> None:
        self.layers, self.kind, self.dtype, self.kernels = layers, flat[0].dtype, dtype, kernels
        self.ranks = [one.shape[0] for one in flat[::2]]
        self.As = [one.to(dtype) for one in flat[::2]]
        self.Bs = [one.to(dtype) for one in flat[1::2]]

    def outputs(self, x_ND: Tensor, kind: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer's y (N, out) in the type `kind`, and x A' (N, r)."""
        lows = self.lows(x_ND) if self.kernels == Kernels.FUSED else []
        found = []
        for at, (layer, A, B) in enumerate(zip(self.layers, self.As, self.Bs, strict=True)):
            lows += [x_ND @ A.t()] if at == len(lows) else []
            y = self.product(x_ND, layer)
            found.append(y.addmm_(lows[at], B.t(), alpha=layer.scale).to(kind))
        return found, lows

    def lows(self, x_ND: Tensor) -> list[Tensor]:
        """x A' (N, r) of each layer, with x read once."""
        if len(self.As) == 1:
            return [x_ND @ self.As[0].t()]
        return list(torch.split(x_ND @ torch.cat(self.As).t(), self.ranks, dim=1))

    def product(self, x_ND: Tensor, layer: Frozen) -> Tensor:
        """x W' (N, out), with the bias, without the adapter's share."""
        weight = layer.weight().to(self.dtype)
        return x_ND @ weight.t() if layer.bias is None else torch.addmm(layer.bias.to(self.dtype), x_ND, weight.t())

    def low_gradients(self, grads_y: Sequence[Tensor]) -> Tensor:
        """The gradients of x A' of all layers, side by side (N, R)."""
        pairs = zip(grads_y, self.Bs, self.layers, strict=True)
        found = [_scaled(grad_y, B, layer.scale) for grad_y, B, layer in pairs]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def adapter_gradients(
        self, grads_y: Sequence[Tensor], grad_low_NR: Tensor, x_ND: Tensor, lows: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradients of A, B, A, B, …"""
        of_A = torch.split((grad_low_NR.t() @ x_ND.to(self.dtype)).to(self.kind), self.ranks)
        triples = zip(grads_y, lows, self.layers, strict=True)
        of_B = [_scaled(grad_y.t(), low, layer.scale).to(self.kind) for grad_y, low, layer in triples]
        return [one for pair in zip(of_A, of_B, strict=True) for one in pair]

    def input_gradient(self, grads_y: Sequence[Tensor], grad_low_NR: Tensor) -> Tensor:
        """The gradient of x (N, in): each layer's added to the one before's in its place."""
        grad_x: Tensor | None = None
        for grad_y, layer in zip(grads_y, self.layers, strict=True):
            weight = layer.weight().to(self.dtype)
            grad_x = grad_y @ weight if grad_x is None else grad_x.addmm_(grad_y, weight)
            del weight
        assert grad_x is not None, "a group of no layers"
        return grad_x.addmm_(grad_low_NR, self.As[0] if len(self.As) == 1 else torch.cat(self.As))


def _scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """scale (one @ other): as the product's own factor it costs no pass of its own. Times 0, nothing is read."""
    return torch.addmm(one.new_empty(()), one, other, beta=0, alpha=scale)


def _gated_outputs(first: _Group, x_ND: Tensor, how: _How) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """h = silu(e) * g (N, F) in the type of products; e and g, the outputs of gate and up; and their x A'."""
    x_in_dtype = x_ND.to(how.dtype)
    if how.kernels == Kernels.FUSED and x_ND.dtype == how.dtype and max(first.ranks) <= MOST_RANK:
        lows = first.lows(x_in_dtype)
        e, g = (first.product(x_in_dtype, layer) for layer in first.layers)
        scales = (first.layers[0].scale, first.layers[1].scale)
        return operators.gated_adapted(e, g, (*lows, *first.Bs), scales, how.keeps), (e, g), lows
    (e, g), lows = first.outputs(x_in_dtype, x_ND.dtype)
    return operators.gated(e, g) if how.kernels else silu(e.to(how.dtype)).mul_(g), (e, g), lows


def _gated_backward(grad_h: Tensor, e: Tensor, g: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    """h = silu(e) * g and the gradients of e and g, in the type of `grad_h`, in whose place one of them lies; with the
    kernel all of them lie in the places of what is given, which nobody needs any more."""
    if kernels:
        operators.gated_backward_(grad_h, e, g)
        return grad_h, e, g
    e = e.to(grad_h.dtype)
    activated = silu(e)
    grad_e = torch.ops.aten.silu_backward(grad_h * g, e)
    h = activated * g
    return h, grad_e, grad_h.mul_(activated)
