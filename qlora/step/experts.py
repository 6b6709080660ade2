"""The experts of a layer, frozen: each token goes through those that its router chose, as transformers' own function.

Rows are sorted by expert, so that there are as many as tokens times experts a token whatever the routing: shapes, and
with them the peak, follow from the number of tokens alone. Weights are dequantized in chunks of whole experts, used and
dropped; frozen, they need no input for the backward pass, and are asked for anew there (dx = dy W). Spread and Permute
are gathers in both directions: what autograd makes of `hidden[places]` adds up with atomics, in any order.

Registered under a name in transformers' interface (`transformers/integrations/moe.py`), one function serves every
family whose experts are decorated for it: gate, activation, clamp and interleaving are the module's own `_apply_gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.step.kernels import experts as kernels
from qlora.step.kernels import trial
from qlora.step.kernels.experts import Packed as Packed

NAME, NOTHING = "qlora", "qlora_nothing"  # of our functions in transformers' interface; the second gives zeros
ADAPTER = "_adapter"  # behind a projection's name: the attribute of its module that has its adapter, where it has one
# Of weights in the type that they are multiplied in, at a time: Qwen3-30B's 768 MiB a projection would be the peak of
# its step at 2,048 tokens (1,201 MiB in one piece, 763 in such chunks, 634 in chunks of 64 MiB, of four times as many).
CHUNK_BYTES = 256 << 20
_ALIGNED_BYTES = 16  # of a row, for torch's grouped product on a card (aten/native/cuda/GroupedBlas.cpp)
# Who multiplies rows with experts that are held in 4 bit: torch, with chunks of them in 16 bit, or our kernel.
IN_CHUNKS, IN_TRITON = "in chunks", "qlora in Triton"


class Stack(Protocol):
    """The weights of all experts of one projection, (E, out, in), in whatever form they are held."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Experts `first` up to `last` (not included), (n, out, in)."""


@runtime_checkable
class PackedStack(Protocol):
    """A stack that the kernel can decode: `block` values share a constant (64 of NF4, 32 of MXFP4).

    `by`: who multiplies with it, as the run under way says; None: the kernel, wherever it runs.
    """

    block: int
    by: str | None

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def packed(self) -> Packed: ...


class Plain:
    """Experts in 16 bit, as their module has them at each call: (E, out, in), or `transposed` (E, in, out)."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name, self.transposed = module, name, bool(module.is_transposed)

    @property
    def shape(self) -> tuple[int, int, int]:
        count, rows, columns = getattr(self.module, self.name).shape
        return (count, columns, rows) if self.transposed else (count, rows, columns)

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """A view where `dtype` is the parameter's own."""
        weights: Tensor = getattr(self.module, self.name)[first:last].to(dtype)
        return weights.transpose(1, 2) if self.transposed else weights


class Routing:
    """Which rows are which expert's. Rows are (token, choice) in the order of tokens until they are sorted by expert.

    expert_S  the expert of each sorted row
    order_S   where each sorted row comes from
    inverse_S where each row went
    token_S   the token of each sorted row
    ends_E    behind the last sorted row of each expert

    `kernel`: in one launch, to the same numbers.
    """

    def __init__(self, index_TK: Tensor, count: int, kernel: bool = False) -> None:
        self.choices = index_TK.shape[1]
        if kernel:
            places = kernels.route(index_TK, count)
            self.expert_S, self.order_S, self.inverse_S, self.token_S, self.ends_E = places
            return
        self.expert_S, self.order_S = torch.sort(index_TK.reshape(-1), stable=True)
        self.token_S = self.order_S // self.choices
        self.inverse_S = torch.argsort(self.order_S)
        numbers = torch.arange(count, dtype=self.expert_S.dtype, device=index_TK.device)
        self.ends_E = torch.searchsorted(self.expert_S, numbers, right=True).int()

    @property
    def rows(self) -> int:
        return self.order_S.shape[0]

    @cached_property
    def bounds(self) -> list[int]:
        """0 and the ends, on the host: one wait for the device. Of meta tensors, which know none, the even split."""
        count = self.ends_E.shape[0]
        if self.ends_E.is_meta:
            return [self.rows * number // count for number in range(count + 1)]
        return [0, *self.ends_E.tolist()]

    def chunks(self, experts: int, on_card: bool) -> Iterator[tuple[int, int, int, int]]:
        """Ranges of at most so many experts that have rows, with their rows: (first, last, begin, end).

        One range of all needs nothing from the device; with fewer rows than experts (an answer's next token), each
        expert that was hit is read by itself.
        """
        count = self.ends_E.shape[0]
        if self.rows < count:
            experts = 1
        elif on_card and experts >= count:
            yield 0, count, 0, self.rows
            return
        for first in range(0, count, experts):
            last = min(count, first + experts)
            begin, end = self.bounds[first], self.bounds[last]
            if begin < end:
                yield first, last, begin, end


def register(product_dtype: Callable[[Tensor], torch.dtype]) -> None:
    """Make our functions known to transformers; `product_dtype` is the type that products of rows are computed in."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, partial(experts_forward, product_dtype))
    ALL_EXPERTS_FUNCTIONS.register(
        NOTHING, lambda module, hidden_TH, index_TK, weights_TK: hidden_TH.new_zeros(hidden_TH.shape)
    )


def experts_forward(
    product_dtype: Callable[[Tensor], torch.dtype], module: Any, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """What transformers' own forward of a decorated module gives, (T, H): the weighted sum of each token's experts."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = stack_of(module, first), stack_of(module, "down_proj")
    routing, dtype = Routing(index_TK, up.shape[0], has_kernel(up, index_TK)), product_dtype(hidden_TH)
    adapted = getattr(module, first + ADAPTER, None)
    if adapted is not None and adapted.is_on:
        rows = adapted.beside(up, routing, dtype, hidden_TH, spread=True)
    else:
        rows = Spread.apply(hidden_TH, routing)  # type: ignore[no-untyped-call]
        rows = GroupedLinear.apply(rows, up, routing, dtype)  # type: ignore[no-untyped-call]
    if module.has_bias:
        rows = rows + getattr(module, f"{first}_bias")[routing.expert_S]
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    adapted = getattr(module, "down_proj" + ADAPTER, None)
    if adapted is not None and adapted.is_on:
        rows = adapted.beside(down, routing, dtype, rows, spread=False)
    else:
        rows = GroupedLinear.apply(rows, down, routing, dtype)  # type: ignore[no-untyped-call]
    if module.has_bias:
        rows = rows + module.down_proj_bias[routing.expert_S]
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    rows = Permute.apply(rows, routing)  # type: ignore[no-untyped-call]
    weighted_TKH = rows.view(*index_TK.shape, -1) * weights_TK[..., None]
    return weighted_TKH.sum(dim=1).to(hidden_TH.dtype)  # type: ignore[no-any-return]


def stack_of(module: Any, name: str) -> Stack:
    """The weights of one projection of a module of experts."""
    held = getattr(module, name)
    return Plain(module, name) if isinstance(held, Tensor) else held


@contextmanager
def skipping(modules: Sequence[Any]) -> Iterator[None]:
    """Modules of experts give zeros inside the block: whoever asks for shapes and calls alone reads no weight."""
    configs = {id(module.config): module.config for module in modules}.values()
    before = [(config, config._experts_implementation) for config in configs]
    try:
        for config, _ in before:
            config._experts_implementation = NOTHING
        yield
    finally:
        for config, name in before:
            config._experts_implementation = name


class Spread(torch.autograd.Function):
    """Each token's hidden states, once for each of its experts, sorted by expert: (T, H) to (S, H)."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return hidden_TH[routing.token_S]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_SH: Tensor) -> Any:
        routing = ctx.routing
        return gradient_SH[routing.inverse_S].view(-1, routing.choices, gradient_SH.shape[-1]).sum(dim=1), None


class Permute(torch.autograd.Function):
    """Sorted rows in the order of tokens again."""

    @staticmethod
    def forward(ctx: Any, rows_SH: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return rows_SH[routing.inverse_S]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_SH: Tensor) -> Any:
        return gradient_SH[ctx.routing.order_S], None


class GroupedLinear(torch.autograd.Function):
    """Sorted rows (S, in) times the weight of their expert, (S, out). Nothing but places is kept."""

    @staticmethod
    def forward(ctx: Any, rows_SI: Tensor, stack: Stack, routing: Routing, dtype: torch.dtype) -> Tensor:
        ctx.about = (stack, routing, dtype)
        return grouped(rows_SI, stack, routing, dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_SO: Tensor) -> Any:
        stack, routing, dtype = ctx.about
        return grouped(gradient_SO, stack, routing, dtype, back=True), None, None, None


def grouped(rows: Tensor, stack: Stack, routing: Routing, dtype: torch.dtype, back: bool = False) -> Tensor:
    """Sorted rows times the transposed weight of their expert; `back`: times the weight. Products are in `dtype`."""
    if rows.dtype == dtype and isinstance(stack, PackedStack) and has_kernel(stack, rows):
        return kernels.grouped(rows, stack.packed(), routing.ends_E, (*stack.shape[1:], stack.block), back)
    count, out, width = stack.shape
    columns = width if back else out
    experts = max(1, min(count, CHUNK_BYTES // (out * width * dtype.itemsize)))
    result = None
    for first, last, begin, end in routing.chunks(experts, rows.is_cuda):
        weights = stack.read(first, last, rows.dtype).to(dtype)
        factors = weights if back else weights.transpose(1, 2)
        part = _products(rows[begin:end].to(dtype), factors, routing, first, begin).to(rows.dtype)
        del weights, factors
        if end - begin == routing.rows:
            return part
        result = rows.new_empty(routing.rows, columns) if result is None else result
        result[begin:end] = part
        del part
    return rows.new_empty(0, columns) if result is None else result


def has_kernel(stack: Stack, like: Tensor) -> bool:
    """Whether a stack's products are the kernel's where `like` is. Meta tensors stand for a card that has it where the
    stack says so."""
    if not isinstance(stack, PackedStack) or stack.by == IN_CHUNKS or not kernels.fits(stack.shape, stack.block):
        return False
    return stack.by == IN_TRITON if like.is_meta else trial.multiplies_experts(like.device)


def _products(rows: Tensor, factors: Tensor, routing: Routing, first: int, begin: int) -> Tensor:
    """Sorted rows of the experts from `first` on, the first of them row `begin`, times their `factors` (n, in, out)."""
    count = factors.shape[0]
    if rows.is_meta:
        return _on_meta(rows, factors, routing.ends_E[first : first + count])
    if count == 1:
        return rows @ factors[0]
    if rows.is_cuda and rows.dtype == torch.bfloat16 and _is_aligned(factors):
        offsets = routing.ends_E[first : first + count] - begin
        return torch.nn.functional.grouped_mm(rows, factors, offs=offsets)
    result = rows.new_empty(rows.shape[0], factors.shape[2])
    for number, (start, end) in enumerate(pairwise(routing.bounds[first : first + count + 1])):
        if start < end:
            torch.mm(rows[start - begin : end - begin], factors[number], out=result[start - begin : end - begin])
    return result


def _on_meta(rows: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    """What a card would give, asked for by the operation that it is asked for there: an estimate sees that. (It is for
    bf16 alone, and values of fp16 are as large.)"""
    if rows.dtype in (torch.bfloat16, torch.float16) and _is_aligned(factors):
        bf16 = torch.bfloat16
        return torch.nn.functional.grouped_mm(rows.view(bf16), factors.view(bf16), offs=ends).view(rows.dtype)
    return torch.mm(rows, factors[0])


def _is_aligned(factors: Tensor) -> bool:
    return all(size * factors.element_size() % _ALIGNED_BYTES == 0 for size in factors.shape[1:])
