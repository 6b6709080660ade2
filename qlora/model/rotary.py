"""Queries and keys turned by their positions in one kernel, where a model's own function is known by what it gives.

A model's attention calls a function of its module with q, k, cosines and sines. Every such function is tried on numbers
of its own: what gives the very bits of a form (`step/kernels/operators.py`) in float32, and in bf16 the same but for
its roundings, is that form. Attention then runs as it was written, with the kernel under that function's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.errors import foreign_failures
from qlora.model.reclassed import called_as
from qlora.step.kernels import operators

Rotate = Callable[..., Any]
# Of the trial: rows, heads of q and of k, positions, columns, and of these the turned ones where some stay.
_ROWS, _HEADS, _TOKENS, _WIDTH, _TURNED = 2, (3, 1), 5, 16, 8
# Of bf16's 8 bits: what is rounded once is within half a step of the truth, what is rounded thrice within two.
_ROUNDINGS = 2**-6


_ANGLES = "inv_freq"  # as transformers calls the buffer that angles are made of, of each kind of layer


class Form(NamedTuple):
    """`pairs`: which columns are turned together (`operators.FORMS`); `partly`: tables may be narrower than heads."""

    pairs: int
    partly: bool


def put_in(model: nn.Module) -> int:
    """Has attention turn queries and keys by the kernel; how many modules do."""
    count = 0
    forms: dict[Any, tuple[tuple[str, Form], ...]] = {}
    for module in list(model.modules()):
        kind: Any = type(module)
        if kind not in forms:
            named = ((name, form_of(function)) for name, function in _called(kind.forward).items())
            forms[kind] = tuple((name, form) for name, form in named if form is not None)
        if forms[kind]:
            module.__class__ = _turning(kind, forms[kind])
            count += 1
    return count


def not_turned(model: nn.Module) -> int:
    """How many modules make tables of angles, if the kernel turns by none of them."""
    if any(getattr(one, "turned_by_kernel", False) for one in model.modules()):
        return 0
    return sum(any(_ANGLES in name for name in one._buffers) for one in model.modules())


def form_of(function: Rotate) -> Form | None:
    """The form that a function of q, k, cosines and sines computes; None for any other function."""
    required = [one for one in inspect.signature(function).parameters.values() if one.default is one.empty]
    if len(required) != 4 or any(one.kind not in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in required):
        return None
    for pairs in operators.FORMS:
        if _computes(function, pairs, _WIDTH):
            return Form(pairs, _computes(function, pairs, _TURNED))
    return None


def _computes(function: Rotate, pairs: int, turned: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(_ROWS, heads, _TOKENS, _WIDTH, generator=generator) for heads in _HEADS)
    tables = [torch.randn(_ROWS, _TOKENS, turned, generator=generator) for _ in range(2)]
    with foreign_failures(trial=True) as failure, torch.no_grad():
        for kind, far in ((torch.float32, 0.0), (torch.bfloat16, _ROUNDINGS)):
            own_q, own_k, cos, sin = (one.to(kind) for one in (q, k, *tables))
            found = function(own_q.clone(), own_k.clone(), cos.clone(), sin.clone())
            if not isinstance(found, tuple) or len(found) != 2:
                return False
            for one, right in zip(found, operators.rope_qk(own_q, own_k, (cos, sin), pairs, False), strict=True):
                if one.dtype != kind or one.shape != right.shape or (one - right).norm() > far * right.norm():
                    return False
    return not failure.error


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: int) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return operators.rope_qk(q, k, (cos, sin), pairs, False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
        given = (_laid_out(grad_q), _laid_out(grad_k))
        return (*operators.rope_qk(*given, ctx.saved_tensors, ctx.pairs, True), None, None, None)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, own: Rotate, form: Form, **named: Any) -> Any:
    """Of the shapes that the kernel knows; anything else is for the model's `own` function."""
    known = not rest and not named and q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape
    if not known or {k.dtype, cos.dtype, sin.dtype} != {q.dtype} or cos.requires_grad or sin.requires_grad:
        return own(q, k, cos, sin, *rest, **named)
    (rows, _, length, width), turned = q.shape, cos.shape[-1]
    fits = turned == width or (form.partly and 0 < turned < width)
    if not fits or turned % 2 or cos.shape[1] != length or cos.shape[0] not in (1, rows) or k.shape[2:] != q.shape[2:]:
        return own(q, k, cos, sin, *rest, **named)
    tables = (cos.contiguous(), sin.contiguous())
    return _Rotation.apply(_laid_out(q), _laid_out(k), *tables, form.pairs)  # type: ignore[no-untyped-call]


def _laid_out(x: Tensor) -> Tensor:
    """The kernel takes any strides but that of the values of a head."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(64)
def _turning(kind: Any, forms: tuple[tuple[str, Form], ...]) -> Any:
    """A class whose forward pass turns by the kernel where `kind` calls functions by these names."""
    own = _called(kind.forward)
    known: dict[str, Rotate] = {name: partial(_rotated, own=own[name], form=form) for name, form in forms}

    class Turning(kind):  # type: ignore[misc]
        turned_by_kernel = True
        forward = _with(kind.forward, known)

    return called_as(kind, Turning)


def _called(function: Any) -> dict[str, Rotate]:
    """Functions of its module that a function names, or what it wraps does."""
    if not isinstance(function, FunctionType):
        return {}
    found = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    own = {name: one for name, one in found.items() if isinstance(one, FunctionType)}
    return own | _called(_wrapped(function))


def _with(function: Any, replaced: Mapping[str, Rotate]) -> Any:
    """A function of the same code that finds `replaced` under these names: it alone, its module stays as it is."""
    inner, cells = _wrapped(function), list(function.__closure__ or ())
    about = dict(vars(function))
    if inner is not None:
        about["__wrapped__"] = own = _with(inner, replaced)
        cells = [CellType(own) if cell.cell_contents is inner else cell for cell in cells]
    names = {name: one for name, one in replaced.items() if name in function.__code__.co_names}
    known = {**function.__globals__, **names}
    copied = FunctionType(function.__code__, known, function.__name__, function.__defaults__, tuple(cells))
    copied.__kwdefaults__, copied.__qualname__, copied.__dict__ = function.__kwdefaults__, function.__qualname__, about
    return copied


def _wrapped(function: FunctionType) -> FunctionType | None:
    """What a wrapper, such as one that renames arguments, calls; None where nothing says so, or it is not there."""
    inner = vars(function).get("__wrapped__")
    there = isinstance(inner, FunctionType) and any(one.cell_contents is inner for one in function.__closure__ or ())
    return inner if there else None
