"""Attention of a CPU over documents that lie one behind the other: each by itself, by torch's flash attention.

With a mask every token is multiplied with every other one of its pack; documents of 57 tokens in a pack of 400 are an
eighth of that. Short ones are computed in fp32: torch's kernel adds up in fp32 anyway, and what it converts on the way,
block by block, costs short documents more than the products do (documents of 100 tokens, 9 heads of 64, forward and
backward: 18.6 ms a pack of 512 with its mask, 12.9 one by one, 6.3 in fp32; one of 400 tokens, 4 heads: 10.5 and 7.1;
torch 2.13, two threads with AVX512-BF16). What is kept for the backward pass has the type of the inputs in either case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora import numerics

# Tokens up to which fp32 is faster, for heads up to so wide, and for wider ones. From 768 on the kernel takes 256
# queries at a time in place of 64 (FlashAttentionKernel.cpp), and bf16 is: 1,024 tokens in 19.7 ms, 23.6 in fp32.
SHORT, NARROW, SHORT_OF_WIDE = 767, 64, 384
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def by_documents(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, lengths: Sequence[int], scale: float | None
) -> Tensor:
    """Causal attention within each document, (N, heads, D); keys are shared by heads where there are fewer (Ainslie et
    al. 2023). `lengths` of the documents add up to N; `scale` of the scores, None: 1/sqrt(D)."""
    return _ByDocuments.apply(query_NHD, key_NKD, value_NKD, tuple(lengths), scale)  # type: ignore[no-any-return, no-untyped-call]


class _ByDocuments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float | None
    ) -> Tensor:
        output_NHD, logsumexps = query.new_empty(query.shape), []  # in the order that the next layer reads
        ctx.short = _short(query.shape[-1])
        for place, (q, k, v) in _apart(lengths, ctx.short, query, key, value):
            found, logsumexp = _FORWARD(q, k, v, 0.0, True, scale=scale)
            output_NHD[place] = found[0].transpose(0, 1)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(query, key, value, output_NHD, *logsumexps)
        ctx.lengths, ctx.scale = lengths, scale
        return output_NHD

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, output, *logsumexps = ctx.saved_tensors
        gradients = [torch.empty_like(one) for one in (query, key, value)]
        documents = _apart(ctx.lengths, ctx.short, query, key, value, output, gradient)
        for (place, (q, k, v, out, grad)), logsumexp in zip(documents, logsumexps, strict=True):
            found = _BACKWARD(grad, q, k, v, out, logsumexp, 0.0, True, scale=ctx.scale)
            for whole, part in zip(gradients, found, strict=True):
                whole[place] = part[0].transpose(0, 1)
        return (*gradients, None, None)


def _short(width: int) -> int:
    """Tokens up to which a document is short, for heads of `width`; a run from before wide heads were told apart goes
    on with the number of these."""
    run = numerics.of_run()
    most = SHORT if run is None else run.fp32_tokens or SHORT_OF_WIDE
    return most if width <= NARROW else min(most, SHORT_OF_WIDE)


def _apart(lengths: Sequence[int], short: int, *states: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Each document's place among the N, and its part (1, heads, S, D) of each of the states (N, heads, D)."""
    begin = 0
    for length in lengths:
        place = slice(begin, begin + length)
        parts = [state[place].float() if length <= short else state[place] for state in states]
        yield place, [part.transpose(0, 1)[None] for part in parts]
        begin += length
