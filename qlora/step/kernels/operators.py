"""The kernels as operators: `torch.ops.qlora.*`, each of which a dispatch mode sees as the one launch that it is.

On a GPU a kernel runs, on `meta` its outputs are made, and on a CPU its twin runs in plain torch: what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
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
_LIBRARY.define(
    "gated_adapted(Tensor e, Tensor g, Tensor low_e, Tensor low_g, Tensor up_e, Tensor up_g, float scale_e, "
    "float scale_g) -> Tensor"
)
_LIBRARY.define(
    "gated_adapted_(Tensor(a!) e, Tensor(b!) g, Tensor low_e, Tensor low_g, Tensor up_e, Tensor up_g, float scale_e, "
    "float scale_g) -> Tensor"
)
_LIBRARY.define("rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, int form, bool back) -> (Tensor, Tensor)")
_LIBRARY.define("cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights, float factor, float cap) -> Tensor")
# Which columns of a head are turned together: i and i + half of them; 2i and 2i + 1; these by the angle of column i.
HALVES, NEIGHBOURS, NEIGHBOURS_BY_HALF = FORMS = (0, 1, 2)
_NESTED = 256  # constants that share one of their own (bitsandbytes' double quantization)
_VALUES = 64  # that share a constant
PART_VALUES = 1 << 17  # of a norm that a CPU takes at a time: half a MiB in float32
ROWS = 64  # of logits that are computed in float32 at a time, without a kernel


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


def gated_adapted(
    e: Tensor, g: Tensor, adapters: tuple[Tensor, ...], scales: tuple[float, float], keeps: bool
) -> Tensor:
    """silu(e) * g of outputs (N, F) that lack their adapters' share, scale * low B'.

    `adapters` are low (N, r) of both, then B (F, r) of both. `keeps`: the whole outputs go over e and g.
    """
    operator = torch.ops.qlora.gated_adapted_ if keeps else torch.ops.qlora.gated_adapted
    return operator(e, g, *adapters, *scales)  # type: ignore[no-any-return]


def rope_qk(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], form: int, back: bool) -> tuple[Tensor, Tensor]:
    """q and k (B, heads, S, D) turned by their positions (Su et al. 2021, section 3.4.2), laid out as (B, S, heads, D).

    `tables` are cosines and sines (B or 1, S, R); R of D columns are turned, the others stay. `back`: by the negative
    angles, which is what becomes of gradients.
    """
    return torch.ops.qlora.rope_qk(q, k, *tables, form, back)  # type: ignore[no-any-return]


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, factor: float, cap: float) -> Tensor:
    """Log-probabilities (N,) of `targets`, in float32; over logits (N, V) go the gradients of -sum(weights * them).

    What a model does with its logits is part of it: times `factor`, then cap * tanh(logits / cap) where `cap` is not 0.
    """
    return torch.ops.qlora.cross_entropy_(logits, targets, weights, factor, cap)  # type: ignore[no-any-return]


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


def _gated_adapted_on_card(keeps: bool, e: Tensor, g: Tensor, *rest: Any) -> Tensor:
    h = torch.empty_like(e)
    launching.gated_adapted((e, g), rest[:4], rest[4:], keeps, h)
    return h


def _rope_qk_on_card(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: int, back: bool) -> tuple[Tensor, Tensor]:
    into = _rope_qk_on_meta(q, k)
    launching.rope_qk((q, k), (cos, sin), form, back, into)
    return into


def _cross_entropy_on_card(logits: Tensor, targets: Tensor, weights: Tensor, *scaling: float) -> Tensor:
    into = torch.empty_like(weights)
    launching.cross_entropy(logits, targets, weights, scaling, into)  # type: ignore[arg-type]
    return into


# --- on meta ----------------------------------------------------------------------------------------------------------


def _rms_norm_on_meta(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)


def _dequantize_on_meta(codes: Tensor, *rest: Any) -> Tensor:
    *_, rows, columns, dtype = rest
    return torch.empty((rows, columns), dtype=dtype, device=codes.device)


def _rope_qk_on_meta(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _token_by_token(q), _token_by_token(k)


def _token_by_token(x: Tensor) -> Tensor:
    """Room for (B, heads, S, D), in which the heads of a token lie side by side: attention and products take it so."""
    _, heads, length, width = x.shape
    return x.new_empty_strided(x.shape, (length * heads * width, width, heads * width, 1))


# --- in plain torch ---------------------------------------------------------------------------------------------------


def _gated_plainly(e: Tensor, g: Tensor) -> Tensor:
    return (silu(e.float()) * g.float()).to(e.dtype)


def _gated_backward_plainly(grad_h: Tensor, e: Tensor, g: Tensor) -> None:
    grad, wide_e, wide_g = grad_h.float(), e.float(), g.float()
    activated = silu(wide_e)
    h, grad_e, grad_g = activated * wide_g, torch.ops.aten.silu_backward(grad * wide_g, wide_e), grad * activated
    for place, value in ((grad_h, h), (e, grad_e), (g, grad_g)):
        place.copy_(value)


def rms_norm_plainly(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    """`rms_norm` in torch."""
    normed, inverses = [], []
    for (part,) in _by_rows(x):
        wide = part.to(torch.float32, copy=True)
        inverse = torch.rsqrt(wide.pow(2).mean(-1) + eps)
        wide.mul_(inverse[:, None])
        normed.append(wide.mul_(1.0 + weight.float()).to(x.dtype) if from_one else wide.to(x.dtype) * weight)
        inverses.append(inverse)
    return _together(normed), _together(inverses)


def rms_norm_backward_plainly(grad_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, from_one: bool) -> Tensor:
    """`rms_norm_backward` in torch."""
    factor, found = 1.0 + weight.float() if from_one else weight.float(), []
    for grad, part, root in _by_rows(grad_y, x, inverse[:, None]):
        weighted = grad.to(torch.float32, copy=True).mul_(factor)
        wide = part.to(torch.float32, copy=True).mul_(root)
        common = (weighted * wide).mean(-1, keepdim=True)
        found.append(weighted.sub_(wide.mul_(common)).mul_(root).to(x.dtype))
    return _together(found)


def _by_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all of them that are computed at a time: few on a CPU, at least one part even of no rows.

    Whole float32 copies are memory that is mapped anew (`heap.py`): a norm of 512 x 576 forth and back takes 2.3 ms as
    transformers has it, 0.87 as a whole, 0.63 so; of 1,024 x 576 8.8, 4.4 and 1.4 (two threads of an EPYC).
    """
    rows = max(1, PART_VALUES // tensors[0].shape[-1]) if tensors[0].is_cpu else max(1, len(tensors[0]))
    return zip(*(torch.split(one, rows) for one in tensors), strict=True)


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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


def _gated_adapted_plainly(keeps: bool, e: Tensor, g: Tensor, *rest: Any) -> Tensor:
    low_e, low_g, up_e, up_g, *scales = rest
    whole = []
    for y, low, up, scale in ((e, low_e, up_e, scales[0]), (g, low_g, up_g, scales[1])):
        whole.append((y.float() + low.float() @ up.float().t() * scale).to(y.dtype))
    h = _gated_plainly(*whole)
    for y, one in zip((e, g), whole, strict=True) if keeps else ():
        y.copy_(one)
    return h


def _rope_qk_plainly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: int, back: bool) -> tuple[Tensor, Tensor]:
    into, turned = _rope_qk_on_meta(q, k), cos.shape[-1]
    halves = (slice(turned // 2), slice(turned // 2, turned))
    pairs = {HALVES: halves, NEIGHBOURS: (slice(0, turned, 2), slice(1, turned, 2))}
    first, second = pairs[min(form, NEIGHBOURS)]
    angles = (halves[0], halves[0]) if form == NEIGHBOURS_BY_HALF else (first, second)
    wide_cos, wide_sin = (one.float().unsqueeze(1) for one in (cos, sin))
    first_cos, second_cos, first_sin, second_sin = (one[..., at] for one in (wide_cos, wide_sin) for at in angles)
    onto_first, onto_second = (second_sin, -first_sin) if back else (-first_sin, second_sin)
    for x, to in zip((q, k), into, strict=True):
        one, other = x[..., first].float(), x[..., second].float()
        to[..., first] = (one * first_cos + other * onto_first).to(x.dtype)
        to[..., second] = (other * second_cos + one * onto_second).to(x.dtype)
        to[..., turned:] = x[..., turned:]
    return into


def _cross_entropy_plainly(logits: Tensor, targets: Tensor, weights: Tensor, factor: float, cap: float) -> Tensor:
    logprobs = torch.empty_like(weights)
    for start in range(0, len(logits), ROWS):
        part = slice(start, start + ROWS)
        z = logits[part].float()
        z = z.mul_(factor) if factor != 1 else z
        z = z.div_(cap).tanh_().mul_(cap) if cap else z
        log_total, rows = z.logsumexp(dim=-1, keepdim=True), torch.arange(len(z), device=z.device)
        logprobs[part] = z[rows, targets[part]] - log_total[:, 0]
        inner = 1 - (z / cap).square_() if cap else None
        gradient = z.sub_(log_total).exp_()
        gradient[rows, targets[part]] -= 1
        gradient *= (weights[part] * factor)[:, None]
        logits[part] = gradient if inner is None else gradient.mul_(inner)
    return logprobs


def _register(name: str, on_card: Any, on_meta: Any, plainly: Any) -> None:
    for key, function in (("CUDA", on_card), ("Meta", on_meta), ("CPU", plainly)):
        _LIBRARY.impl(name, function, key)


_register("gated", _gated_on_card, lambda e, g: torch.empty_like(e), _gated_plainly)
_register("gated_backward_", launching.gated_backward, lambda grad_h, e, g: None, _gated_backward_plainly)
_register("rms_norm", _rms_norm_on_card, _rms_norm_on_meta, rms_norm_plainly)
_register(
    "rms_norm_backward",
    _rms_norm_backward_on_card,
    lambda grad_y, x, *rest: torch.empty_like(x),
    rms_norm_backward_plainly,
)
_register(
    "gated_adapted",
    partial(_gated_adapted_on_card, False),
    lambda e, *rest: torch.empty_like(e),
    partial(_gated_adapted_plainly, False),
)
_register(
    "gated_adapted_",
    partial(_gated_adapted_on_card, True),
    lambda e, *rest: torch.empty_like(e),
    partial(_gated_adapted_plainly, True),
)
_register("rope_qk", _rope_qk_on_card, _rope_qk_on_meta, _rope_qk_plainly)
_register(
    "cross_entropy_",
    _cross_entropy_on_card,
    lambda logits, targets, weights, *scaling: torch.empty_like(weights),
    _cross_entropy_plainly,
)
_register("dequantize", _dequantize_on_card, _dequantize_on_meta, _dequantize_plainly)
