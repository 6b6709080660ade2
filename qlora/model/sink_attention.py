"""Attention with sinks (gpt-oss): each head has one more score, of no token, which takes its part of the softmax.

A kernel that knows none computes what is needed: its output and the log of the sum of exponentials, L. With a sink s of
the head, L' = log(exp(L) + exp(s)) and the output is exp(L - L') times the kernel's. Its own backward pass, given this
output and L' in the place of L, gives the gradients: probabilities are exp(score - L'), and the sum that it takes of
output and gradient is the one over all tokens, since the sink's value is zero. So memory is the kernel's, linear in
tokens, where transformers' eager attention has scores of heads * S * S several times over (huggingface/transformers,
modeling_gpt_oss.py, eager_attention_forward).

Each function takes query (B, heads, S, D), key and value (B, kv heads, S, D), what is seen, the scale of the scores and
the sinks (heads,), and returns (B, S, heads, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.model.document_attention import (
    by_length_classes,
    causal_band,
    flat,
    has_varlen,
    output_shape,
    varlen_window,
)
from qlora.model.document_mask import DocumentMask

# Whose attention hands its sinks to the registered function as `s_aux`, and has no more to it.
MODEL_TYPES = ("gpt_oss",)
QUERIES_AT_ONCE = 128  # whose scores exist at a time where no kernel is asked for
_CAUSAL = 1  # mem_eff_attention/kernel_forward.h, CustomMaskType::CausalFromTopLeft

SinkKernel = Callable[[Tensor, Tensor, Tensor, DocumentMask, float | None, Tensor], Tensor]


def has_sinks(config: Any) -> bool:
    """Whether a model of this configuration attends with sinks."""
    return getattr(config, "model_type", None) in MODEL_TYPES


@dataclass(frozen=True)
class _Kernel:
    """A kernel's two passes, by its own forms of tensors.

    forward   query, key, value to output, L (fp32), and what else its backward pass takes
    backward  gradient, query, key, value, output, L' and the rest to gradients of query, key, value
    to_sums   sinks (heads,) so that they are added to L
    to_output what is shaped as L as factors of the output
    heads     the output's dimension of heads
    """

    forward: Callable[..., tuple[Tensor, Tensor, tuple[Any, ...]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    to_sums: Callable[[Tensor], Tensor]
    to_output: Callable[[Tensor], Tensor]
    heads: int


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, kernel: _Kernel) -> Tensor:
        output, sums, rest = kernel.forward(query, key, value)
        total = torch.logaddexp(sums, kernel.to_sums(sinks.float()))
        output = output.mul_(kernel.to_output(torch.exp(sums - total)))
        ctx.save_for_backward(query, key, value, sinks, output, total)
        ctx.kernel, ctx.rest = kernel, rest
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, sinks, output, total = ctx.saved_tensors
        kernel: _Kernel = ctx.kernel
        found = kernel.backward(gradient.contiguous(), query, key, value, output, total, *ctx.rest)
        of_sinks = None
        if ctx.needs_input_grad[3]:  # of the sink's share, whose value is zero: less what all others have
            share = kernel.to_output(torch.exp(kernel.to_sums(sinks.float()) - total))
            each = share * (gradient.float() * output.float()).sum(dim=-1, keepdim=True)
            others = [dim for dim in range(each.ndim) if dim != kernel.heads]
            of_sinks = -each.sum(dim=others).to(sinks.dtype)
        return (*found, of_sinks, None)


# --- kernels ----------------------------------------------------------------------------------------------------------


def varlen(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None, sinks: Tensor) -> Tensor:
    """By torch.nn.attention.varlen's flash kernel, whose L is (heads, N). Raises NotImplementedError without it."""
    if not has_varlen():  # which imports what makes the operators known
        raise NotImplementedError("this torch has no varlen_attn with windows, shared keys and a scale")
    ops, batch = torch.ops.torch_attn, mask.batch
    window, starts, most = varlen_window(mask), batch.cu_seqlens, batch.max_document
    places, shared = (starts, starts, most, most), query.shape[1] != key.shape[1]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        output, sums, state = ops._varlen_attn(q, k, v, *places, window == (-1, 0), scale, list(window), shared)
        return output, sums, (state,)

    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, total: Tensor, state: Any) -> Any:
        causal = window == (-1, 0)
        return ops._varlen_attn_backward(gradient, q, k, v, output, total, *places, causal, state, scale, list(window))

    kernel = _Kernel(forward, backward, lambda sink: sink[:, None], lambda sums: sums.t()[..., None], heads=1)
    found: Tensor = _WithSinks.apply(*map(flat, (query, key, value)), sinks, kernel)  # type: ignore[no-untyped-call]
    return found.view(*output_shape(query))


def efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None, sinks: Tensor
) -> Tensor:
    """By aten's memory-efficient kernel, whose L is (documents, heads, longest, rounded up)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        kernel = _efficient(len(q), starts, longest, mask.window, scale)
        found: Tensor = _WithSinks.apply(q[None], k[None], v[None], sinks, kernel)  # type: ignore[no-untyped-call]
        return found[0]

    return by_length_classes(query, key, value, mask, attend)


def _efficient(tokens: int, starts: Tensor, longest: int, window: int | None, scale: float | None) -> _Kernel:
    narrow = window if window is not None and window < longest else None
    places = (starts, starts, longest, longest)
    numbers = torch.arange(tokens, device=starts.device)
    documents = torch.searchsorted(starts, numbers, right=True) - 1
    within = numbers - starts[documents]

    def more(q: Tensor) -> dict[str, Any]:  # on meta its backward pass takes neither; the tensors are the same
        return {"scale": None, "window_size": None} if q.is_meta else {"scale": scale, "window_size": narrow}

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        output, sums, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, *places, 0.0, _CAUSAL, True, **more(q)
        )
        return output, sums, (seed, offset)

    def backward(
        gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, total: Tensor, seed: Any, offset: Any
    ) -> Any:
        back = torch.ops.aten._efficient_attention_backward
        of_dropout = (0.0, seed, offset, _CAUSAL, False)
        return back(gradient, q, k, v, None, output, *places, total, *of_dropout, **more(q))[:3]

    def to_output(sums: Tensor) -> Tensor:
        return sums[documents, :, within][None, ..., None]

    return _Kernel(forward, backward, lambda sink: sink[None, :, None], to_output, heads=2)


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None, sinks: Tensor
) -> Tensor:
    """Each document by itself, as a CPU computes it where it is asked to."""
    parts = []
    for q, k, v in _documents(query, key, value, mask):
        length, window = q.shape[2], mask.window
        band = None if window is None or length <= window else causal_band(length, window, q.device)
        parts.append(_on_cpu(q, k, v, band, scale, sinks)[0].transpose(0, 1))
    return torch.cat(parts).view(*output_shape(query))


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None, sinks: Tensor
) -> Tensor:
    """What all of them compute, in plain products of each document alone: what a trial compares with."""
    parts = []
    for q, k, v in _documents(query, key, value, mask):
        length = q.shape[2]
        seen = causal_band(length, length if mask.window is None else mask.window, q.device)
        parts.append(_by_scores(q, k, v, seen, scale, sinks)[0].transpose(0, 1))
    return torch.cat(parts).view(*output_shape(query))


def _documents(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask) -> Any:
    """Query, key and value (1, heads, length, D) of each document."""
    lengths = list(mask.batch.document_lengths)
    pieces = (torch.split(flat(one), lengths) for one in (query, key, value))
    return (tuple(one.transpose(0, 1)[None] for one in document) for document in zip(*pieces, strict=True))


def with_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: tuple[float | None, Tensor],
    device_type: str,
) -> Tensor:
    """Under a boolean mask (B, 1, S, T), or without one causal: on a CPU by its kernel, else by blocks. `settings` are
    the scale and the sinks; `device_type` is that of what meta tensors stand for."""
    scale, sinks = settings
    rows, keys = query.shape[2], key.shape[2]
    if device_type == "cpu" and rows > 1 and query.dtype != torch.float16:
        return _on_cpu(query, key, value, mask, scale, sinks).transpose(1, 2)
    seen = causal_band(keys, keys, query.device)[-rows:] if mask is None else mask
    kernel = _by_blocks(seen, query.shape[-1] ** -0.5 if scale is None else scale)
    found: Tensor = _WithSinks.apply(query, key, value, sinks, kernel)  # type: ignore[no-untyped-call]
    return found.transpose(1, 2)


def _by_blocks(seen: Tensor, scale: float) -> _Kernel:
    """Scores of a few queries at a time, forth and back, where they are `seen` (…, S, T): no kernel is asked for."""

    def scores(q: Tensor, k: Tensor, at: int) -> Tensor:
        found = (q[:, :, at : at + QUERIES_AT_ONCE] @ k.transpose(2, 3)).float().mul_(scale)
        there = seen[..., at : at + QUERIES_AT_ONCE, :]
        return found.masked_fill_(~there, torch.finfo(torch.float32).min)

    def wide(q: Tensor, *others: Tensor) -> list[Tensor]:
        return [one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in others]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        (k, v), output = wide(q, k, v), torch.empty_like(q, memory_format=torch.contiguous_format)
        sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        for at in range(0, q.shape[2], QUERIES_AT_ONCE):
            block, here = scores(q, k, at), slice(at, at + QUERIES_AT_ONCE)
            sums[:, :, here] = block.logsumexp(dim=-1)
            output[:, :, here] = torch.exp(block - sums[:, :, here, None]).to(v.dtype) @ v
        return output, sums, ()

    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, total: Tensor) -> Any:
        groups, (k, v), of_queries = q.shape[1] // k.shape[1], wide(q, k, v), torch.empty_like(q)
        of_keys, of_values = (torch.zeros(one.shape, dtype=torch.float32, device=q.device) for one in (k, v))
        for at in range(0, q.shape[2], QUERIES_AT_ONCE):
            here = slice(at, at + QUERIES_AT_ONCE)
            weights, own = torch.exp(scores(q, k, at) - total[:, :, here, None]), gradient[:, :, here]
            of_values += weights.to(q.dtype).transpose(2, 3) @ own
            delta = (own.float() * output[:, :, here].float()).sum(dim=-1, keepdim=True)
            of_scores = (weights * ((own @ v.transpose(2, 3)).float() - delta) * scale).to(q.dtype)
            of_queries[:, :, here] = of_scores @ k
            of_keys += of_scores.transpose(2, 3) @ q[:, :, here]
        shared = (one.view(len(one), -1, groups, *one.shape[2:]).sum(dim=2).to(q.dtype) for one in (of_keys, of_values))
        return (of_queries, *shared)

    return _Kernel(forward, backward, lambda sink: sink[None, :, None], lambda sums: sums[..., None], heads=1)


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float | None, sinks: Tensor
) -> Tensor:
    """By the CPU's flash kernel, (B, heads, S, D), whose L is (B, heads, S); causal where nothing is `seen`."""
    aten = torch.ops.aten
    if seen is not None:
        lowest = torch.scalar_tensor(float("-inf"), dtype=query.dtype, device=query.device)
        seen = torch.where(seen, 0.0, lowest).expand(query.shape[0], 1, query.shape[2], key.shape[2])
    how: dict[str, Any] = {"attn_mask": seen, "scale": scale}

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        return (*aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, seen is None, **how), ())

    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, total: Tensor) -> Any:
        back = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return back(gradient, q, k, v, output, total, 0.0, seen is None, **how)

    kernel = _Kernel(forward, backward, lambda sink: sink[None, :, None], lambda sums: sums[..., None], heads=1)
    return _WithSinks.apply(query, key, value, sinks, kernel)  # type: ignore[no-any-return, no-untyped-call]


def _by_scores(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None, sinks: Tensor) -> Tensor:
    """By the definition, (B, heads, S, D): scores where `seen`, and the sink's, softmax in fp32, weighted sum."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.float().masked_fill(~seen, torch.finfo(torch.float32).min)
    sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(query.dtype) @ value


KERNELS: dict[str, SinkKernel] = {"varlen": varlen, "efficient": efficient, "one by one": one_by_one}
