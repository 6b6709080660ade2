"""Low-rank adapters on frozen experts, by two narrow products beside the frozen one: y = x W' + s (x A') B', by expert.

The sum W + s B A of all experts, which peft makes of a parameter, keeps and goes back through, never exists (on
Qwen3-30B-A3B 1.1 GiB of bf16 a layer, and as much for its gradient). Rows are sorted by expert, as `experts` has them,
and each expert's A and B are one matrix of a stack: all products are grouped by the same function as the frozen one's,
and so is the order of their sums.

What is kept for the backward pass is the input and x A' (S, r). Of the first projection the input is the tokens' own
hidden states (T, H), which are spread to their experts anew: kept spread, they would be as many times as large as a
token has experts. Experts that no row went to have a gradient of zeros.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad

from qlora.step.experts import Routing, Stack, grouped

# A row of a factor of torch's grouped product on a card is a multiple of so many bf16 values (16 bytes): lower ranks
# are filled up with zeros for the product.
_ALIGNED_RANK = 8


class Factors:
    """A's (E, r, in) or B's (E, r, out) of all experts, as the stack of weights that `grouped` multiplies by."""

    def __init__(self, stack_ERN: Tensor) -> None:
        self.stack_ERN = stack_ERN

    @property
    def shape(self) -> tuple[int, int, int]:
        count, rank, width = self.stack_ERN.shape
        return count, rank, width

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.stack_ERN[first:last].to(dtype)


class How(NamedTuple):
    """Of one projection, for one call.

    stack   the frozen weights
    routing which rows are which expert's
    dtype   that products are computed in
    scale   s, the factor of the adapter
    spread  the inputs are tokens (T, in), each of which goes to several experts; else rows (S, in), sorted already
    """

    stack: Stack
    routing: Routing
    dtype: torch.dtype
    scale: float
    spread: bool

    def rows(self, inputs: Tensor) -> Tensor:
        return inputs[self.routing.token_S] if self.spread else inputs


class AdaptedLinear(torch.autograd.Function):
    """Rows times the weight of their expert, with its adapter beside it: (S, out). A (E, r, in), B (E, r, out)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, A: Tensor, B: Tensor, how: How) -> Tensor:
        rows_SI = how.rows(inputs)
        of_A, of_B = _factors(A, rows_SI), _factors(B, rows_SI)
        low_SR = grouped(rows_SI, of_A, how.routing, how.dtype)
        y_SO = grouped(rows_SI, how.stack, how.routing, how.dtype)
        del rows_SI
        y_SO.add_(grouped(low_SR, of_B, how.routing, how.dtype, back=True), alpha=how.scale)
        ctx.save_for_backward(inputs, low_SR, A, B)
        ctx.how = how
        return y_SO

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_SO: Tensor) -> Any:
        inputs, low_SR, A, B = ctx.saved_tensors
        how: How = ctx.how
        of_A, of_B = _factors(A, gradient_SO), _factors(B, gradient_SO)
        grad_B = _outer(low_SR, gradient_SO, how).mul_(how.scale)[:, : B.shape[1]].to(B.dtype)
        grad_low_SR = grouped(gradient_SO, of_B, how.routing, how.dtype).mul_(how.scale)
        grad_A = _outer(grad_low_SR, how.rows(inputs), how)[:, : A.shape[1]].to(A.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_A, grad_B, None
        grad_SI = grouped(gradient_SO, how.stack, how.routing, how.dtype, back=True)
        grad_SI.add_(grouped(grad_low_SR, of_A, how.routing, how.dtype, back=True))
        if how.spread:
            return _gathered(grad_SI, how.routing), grad_A, grad_B, None
        return grad_SI, grad_A, grad_B, None


def _factors(stack_ERN: Tensor, rows: Tensor) -> Factors:
    rank = stack_ERN.shape[1]
    on_card = rows.is_cuda and rank % _ALIGNED_RANK
    return Factors(pad(stack_ERN, (0, 0, 0, -rank % _ALIGNED_RANK)) if on_card else stack_ERN)


def _gathered(gradient_SH: Tensor, routing: Routing) -> Tensor:
    """The gradient of tokens (T, H) of that of their rows: gathered and added up in one order, as `experts.Spread`."""
    return gradient_SH[routing.inverse_S].view(-1, routing.choices, gradient_SH.shape[-1]).sum(dim=1)


def _outer(low_SR: Tensor, wide_SN: Tensor, how: How) -> Tensor:
    """Each expert's low' wide over its own rows, (E, r, N), in the type of products; zeros of one without rows."""
    routing, count = how.routing, how.routing.ends_E.shape[0]
    if low_SR.is_meta:
        torch.mm(low_SR.t(), wide_SN)  # whose arithmetic it is, for an estimate of time
        return wide_SN.new_empty((count, low_SR.shape[1], wide_SN.shape[1]), dtype=how.dtype)
    if wide_SN.is_cuda and how.dtype == torch.bfloat16 and wide_SN.shape[1] % _ALIGNED_RANK == 0:
        found = grouped_mm(low_SR.to(how.dtype).t(), wide_SN.to(how.dtype), offs=routing.ends_E)
        starts_E = torch.nn.functional.pad(routing.ends_E, (1, 0))[:-1]
        return found.masked_fill_((routing.ends_E == starts_E)[:, None, None], 0)  # sums over no rows may be anything
    result = wide_SN.new_zeros((count, low_SR.shape[1], wide_SN.shape[1]), dtype=how.dtype)
    for expert, (start, end) in enumerate(pairwise(routing.bounds)):
        if start < end:
            torch.mm(low_SR[start:end].to(how.dtype).t(), wide_SN[start:end].to(how.dtype), out=result[expert])
    return result
