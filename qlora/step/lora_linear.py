"""Frozen linear layers with low-rank adapters beside them, as one function of autograd each.

y = x W' + s (x A') B', the adapter's share added in the product's own place: no copy of the output, no scaled one, no
sum (peft's forward reads and writes every output seven times). What is kept for the backward pass is the input, x A'
(r wide), and for an MLP the outputs of gate and up; their product is computed again. Layers that share an input add its
gradients up in one buffer, and read it once for the gradients of all their A. W is dequantized where it is used and
dropped behind it, and it is asked for anew in the backward pass: between the two it may have been somewhere else.

Products are computed in `dtype`: that of the inputs, or float32 where a CPU multiplies bf16 number by number; then
weight and adapter are added up before they are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def shared_input(
    inputs: Tensor, layers: Sequence[Frozen], adapters: Sequence[Adapter], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The outputs (..., out) of one layer, or of several, such as q, k and v, that take the same `inputs` (..., in).

    Models change them in their own places (OLMo caps q, k and v, Falcon adds to an MLP's), which autograd refuses of
    views made inside of a function: here they get their shape outside of it.
    """
    flat = [tensor for adapter in adapters for tensor in adapter]
    outputs = _SharedInput.apply(_rows(inputs), tuple(layers), dtype, *flat)  # type: ignore[no-untyped-call]
    return tuple(output.view(*inputs.shape[:-1], output.shape[-1]) for output in outputs)


def gated_mlp(
    inputs: Tensor, layers: Sequence[Frozen], adapters: Sequence[Adapter], dtype: torch.dtype, kernels: bool = False
) -> Tensor:
    """down(silu(gate(x)) * up(x)) of `inputs` (..., in); `layers` are gate, up and down (Shazeer 2020, section 2).

    `kernels`: what lies between the products is one kernel forth and one back (`step/kernels`).
    """
    flat = [tensor for adapter in adapters for tensor in adapter]
    y_ND = _GatedMLP.apply(_rows(inputs), tuple(layers), (dtype, kernels), *flat)  # type: ignore[no-untyped-call]
    return y_ND.view(*inputs.shape[:-1], y_ND.shape[-1])  # type: ignore[no-any-return]


def _rows(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, inputs.shape[-1])


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, layers: Sequence[Frozen], dtype: torch.dtype, A: Tensor, *rest: Tensor) -> Any:
        # With `*flat` alone there are as many names as one layer has arguments: torch's compiler (2.13) then drops ctx.
        flat = (A, *rest)
        group = _Group(layers, flat, dtype)
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
    def forward(ctx: Any, x_ND: Tensor, layers: Sequence[Frozen], how: Any, *flat: Tensor) -> Any:
        dtype, kernels = how
        first, down = _Group(layers[:2], flat[:4], dtype), _Group(layers[2:], flat[4:], dtype)
        (e_NF, g_NF), lows = first.outputs(x_ND.to(dtype), x_ND.dtype)
        (y_ND,), lows_h = down.outputs(_gated(e_NF, g_NF, how), x_ND.dtype)
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

    def __init__(self, layers: Sequence[Frozen], flat: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.layers, self.kind, self.dtype = layers, flat[0].dtype, dtype
        self.ranks = [one.shape[0] for one in flat[::2]]
        self.As = [one.to(dtype) for one in flat[::2]]
        self.Bs = [one.to(dtype) for one in flat[1::2]]

    def outputs(self, x_ND: Tensor, kind: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Each layer's y (N, out) in the type `kind`, and x A' (N, r)."""
        found, lows = [], []
        for layer, A, B in zip(self.layers, self.As, self.Bs, strict=True):
            low = x_ND @ A.t()
            lows.append(low)
            weight = layer.weight().to(self.dtype)
            y = x_ND @ weight.t() if layer.bias is None else torch.addmm(layer.bias.to(self.dtype), x_ND, weight.t())
            del weight
            found.append(y.addmm_(low, B.t(), alpha=layer.scale).to(kind))
        return found, lows

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


def _gated(e: Tensor, g: Tensor, how: tuple[torch.dtype, bool]) -> Tensor:
    """silu(e) * g, in the type of products."""
    dtype, kernels = how
    return operators.gated(e, g) if kernels else silu(e.to(dtype)).mul_(g)


def _gated_backward(grad_h: Tensor, e: Tensor, g: Tensor, kernels: bool) -> tuple[Tensor, Tensor, Tensor]:
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
