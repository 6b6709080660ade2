"""Attention over documents as one operator: torch's compiler sees shapes of queries, and nothing of the micro-batch.

How many documents a micro-batch has, and how long they are, differs from step to step; a graph that knew of it would
be made anew for each. A compiled layer is therefore handed a stand-in for its DocumentMask, and the operator finds the
mask where `behind` has put it last: a backward pass ends before the next micro-batch's forward pass begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.model import sink_attention
from qlora.model.document_attention import KERNELS
from qlora.model.document_mask import DocumentMask

_NO_WINDOW = 0
_NOW: dict[int, DocumentMask] = {}  # by window


@dataclass(frozen=True)
class StandIn:
    """For a DocumentMask, by what a graph may know of it."""

    window: int


def behind(value: Any) -> Any:
    """A stand-in for a mask of documents, which is kept; anything else is itself."""
    if not isinstance(value, DocumentMask):
        return value
    window = value.window or _NO_WINDOW
    _NOW[window] = value
    return StandIn(window)


@dataclass(frozen=True)
class Scores:
    """What becomes of a layer's scores: their scale and cap (None: the usual one, none), and one more a head (heads,),
    of no token (`sink_attention`)."""

    scale: float | None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend(kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: StandIn, scores: Scores) -> Tensor:
    """As `by_kernel`, (B, S, heads, D). Sinks get no gradient."""
    settings = (scores.scale, scores.softcap, scores.sinks)
    return _attend(query, key, value, kernel, mask.window, *settings)  # type: ignore[no-any-return]


def by_kernel(kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scores: Scores) -> Tensor:
    """Attention over documents by one of KERNELS, or by the one of that name that has sinks."""
    if scores.sinks is not None:
        return sink_attention.KERNELS[kernel](query, key, value, mask, scores.scale, scores.sinks)
    return KERNELS[kernel](query, key, value, mask, scores.scale, scores.softcap)


@contextmanager
def _recording() -> Iterator[None]:
    """autograd records inside, which it doesn't in an operator: torch leaves its dispatch keys out there."""
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        for key in (keys.AutogradFunctionality, keys.AutogradCPU, keys.AutogradCUDA, keys.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


@torch.library.custom_op("qlora::attend_documents", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: str,
    window: int,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    found = by_kernel(kernel, query, key, value, _NOW[window], Scores(scale, softcap, sinks))
    return found.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("qlora::attend_documents_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: str,
    window: int,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends once more: what a kernel keeps for its backward pass differs from kernel to kernel."""
    with _recording():
        query, key, value = (one.detach().requires_grad_() for one in (query, key, value))
        output = by_kernel(kernel, query, key, value, _NOW[window], Scores(scale, softcap, sinks))
        found = torch.autograd.grad(output, (query, key, value), gradient)
    first, second, third = (one.contiguous() for one in found)
    return first, second, third


@_attend.register_fake  # type: ignore[untyped-decorator]
def _shape(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    rows, heads, tokens, _width = query.shape
    return query.new_empty((rows, tokens, heads, value.shape[-1]))


@_attend_backward.register_fake  # type: ignore[untyped-decorator]
def _shapes(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (one.new_empty(one.shape) for one in (query, key, value))
    return first, second, third


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], inputs[-1])
    ctx.settings = inputs[3:-1]


def _back(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, sinks = ctx.saved_tensors
    return (*_attend_backward(gradient, query, key, value, *ctx.settings, sinks), None, None, None, None, None)


_attend.register_autograd(_back, setup_context=_keep)
