"""The kernels as operators: `torch.ops.qlora.*`, each of which a dispatch mode sees as the one launch that it is.

On a GPU a kernel runs, on `meta` its outputs are made, and on a CPU its twin runs in plain torch: what is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from qlora.step.kernels import launching

_LIBRARY: Any = torch.library.Library("qlora", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("gated(Tensor e, Tensor g) -> Tensor")
_LIBRARY.define("gated_backward_(Tensor(a!) grad_h, Tensor(b!) e, Tensor(c!) g) -> ()")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps, bool from_one) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor inverse, bool from_one) -> Tensor")
_LIBRARY.define(
    "dequantize(Tensor codes, Tensor values, Tensor absmax, Tensor constants, Tensor nested, Tensor offset, "
    "int rows, int columns, ScalarType dtype) -> Tensor"
)
_NESTED = 256  # constants that share one of their own (bitsandbytes' double quantization)
_VALUES = 64  # that share a constant


def gated(e: Tensor, g: Tensor) -> Tensor:
    """silu(e) * g."""
    return torch.ops.qlora.gated(e, g)  # type: ignore[no-any-return]


def gated_backward_(grad_h: Tensor, e: Tensor, g: Tensor) -> None:
    """Over the gradient of h = silu(e) * g goes h itself, over e and g go their gradients."""
    torch.ops.qlora.gated_backward_(grad_h, e, g)


def rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    """x (N, D) over the root of its mean square, times weight, and 1/root (N,) in float32 (Zhang & Sennrich 2019).

    `from_one`: the factor is 1 + weight, and all of it is computed in float32 (Gemma); else x/root is rounded first.
    """
    return torch.ops.qlora.rms_norm(x, weight, eps, from_one)  # type: ignore[no-any-return]


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, from_one: bool) -> Tensor:
    """The gradient of x; weight is not trained."""
    return torch.ops.qlora.rms_norm_backward(grad_y, x, weight, inverse, from_one)  # type: ignore[no-any-return]


def dequantize(codes: Tensor, tables: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A weight (out, in) in `dtype` from its codes of 4 bit and constants of 8 bit.

    `tables` are the 16 values that a code stands for, the constants, the 256 values that one of them stands for, the
    nested constants, and what was taken off all constants.
    """
    return torch.ops.qlora.dequantize(codes, *tables, *shape, dtype)  # type: ignore[no-any-return]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def _gated_on_card(e: Tensor, g: Tensor) -> Tensor:
    h = torch.empty_like(e)
    launching.gated(e, g, h)
    return h


def _rms_norm_on_card(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    into = _rms_norm_on_meta(x, weight, eps, from_one)
    launching.rms_norm(x, weight, eps, from_one, into)
    return into


def _rms_norm_backward_on_card(grad_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, from_one: bool) -> Tensor:
    into = torch.empty_like(x)
    launching.rms_norm_backward(grad_y, x, weight, inverse, from_one, into)
    return into


def _dequantize_on_card(codes: Tensor, *rest: Any) -> Tensor:
    weight = _dequantize_on_meta(codes, *rest)
    launching.dequantize(codes, rest[:5], weight)
    return weight


# --- on meta ----------------------------------------------------------------------------------------------------------


def _rms_norm_on_meta(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)


def _dequantize_on_meta(codes: Tensor, *rest: Any) -> Tensor:
    *_, rows, columns, dtype = rest
    return torch.empty((rows, columns), dtype=dtype, device=codes.device)


# --- in plain torch ---------------------------------------------------------------------------------------------------


def _gated_plainly(e: Tensor, g: Tensor) -> Tensor:
    return (silu(e.float()) * g.float()).to(e.dtype)


def _gated_backward_plainly(grad_h: Tensor, e: Tensor, g: Tensor) -> None:
    grad, wide_e, wide_g = grad_h.float(), e.float(), g.float()
    activated = silu(wide_e)
    h, grad_e, grad_g = activated * wide_g, torch.ops.aten.silu_backward(grad * wide_g, wide_e), grad * activated
    for place, value in ((grad_h, h), (e, grad_e), (g, grad_g)):
        place.copy_(value)


def _rms_norm_plainly(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    normed = wide * inverse[:, None]
    if from_one:
        return (normed * (1.0 + weight.float())).to(x.dtype), inverse
    return normed.to(x.dtype) * weight, inverse


def _rms_norm_backward_plainly(grad_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, from_one: bool) -> Tensor:
    weighted = grad_y.float() * (1.0 + weight.float() if from_one else weight.float())
    normed = x.float() * inverse[:, None]
    common = (weighted * normed).mean(-1, keepdim=True)
    return ((weighted - normed * common) * inverse[:, None]).to(x.dtype)


def _dequantize_plainly(
    codes: Tensor,
    values: Tensor,
    absmax: Tensor,
    constants: Tensor,
    nested: Tensor,
    offset: Tensor,
    *of_weight: int | torch.dtype,
) -> Tensor:
    rows, columns, dtype = of_weight
    constant = constants[absmax.int()] * nested.repeat_interleave(_NESTED)[: absmax.numel()] + offset
    packed = codes.reshape(-1).int()
    both = values[torch.stack((packed >> 4, packed & 15), dim=1).view(-1, _VALUES)] * constant[:, None]
    return both.view(rows, columns).to(dtype)  # type: ignore[arg-type]


def _register(name: str, on_card: Any, on_meta: Any, plainly: Any) -> None:
    for key, function in (("CUDA", on_card), ("Meta", on_meta), ("CPU", plainly)):
        _LIBRARY.impl(name, function, key)


_register("gated", _gated_on_card, lambda e, g: torch.empty_like(e), _gated_plainly)
_register("gated_backward_", launching.gated_backward, lambda grad_h, e, g: None, _gated_backward_plainly)
_register("rms_norm", _rms_norm_on_card, _rms_norm_on_meta, _rms_norm_plainly)
_register(
    "rms_norm_backward",
    _rms_norm_backward_on_card,
    lambda grad_y, x, *rest: torch.empty_like(x),
    _rms_norm_backward_plainly,
)
_register("dequantize", _dequantize_on_card, _dequantize_on_meta, _dequantize_plainly)
