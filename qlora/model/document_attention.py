"""Attention over documents that lie one behind the other, without an S × S mask: one function a kernel.

Each takes query (B, heads, S, D), key and value (B, kv heads, S, D), a `DocumentMask`, the scale of the scores (None:
1/sqrt(D)) and their cap (Gemma 2 report, section 2; None: none), and returns (B, S, heads, D). Padding is computed as
part of the document before it. None of them asks the device anything.

`varlen` is torch's flash attention by `cu_seqlens` (Dao 2023; aten/native/transformers/cuda/flash_attn): Ampere and
later, and not in builds for native Windows. `efficient` is the memory-efficient kernel (Rabe & Staats 2021;
mem_eff_attention), which every card and system has, with keys repeated for the heads that share them. `flex` compiles
the cap into its kernel and skips blocks of other documents. `one_by_one` says what all of them compute, each
document alone: the reference, and what a CPU computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from qlora.model import cpu_attention
from qlora.model.document_mask import DocumentMask

Kernel = Callable[[Tensor, Tensor, Tensor, DocumentMask, float | None, float | None], Tensor]

# Of the flash kernels: flash_attn/flash_api.cpp, mha_varlen_fwd ("at most 256", "a multiple of 8").
MOST_HEAD_DIM, HEAD_DIM_MULTIPLE = 256, 8
EFFICIENT_ROWS = 128  # of the float32 sums of its backward pass (attention_backward.cu), for each document
FLEX_BLOCK = 128  # rows of flex_attention's blocks; fewer queries are computed by another kernel (flex_decoding)
MOST_VARIANTS = 64
_CAUSAL = 1  # mem_eff_attention/kernel_forward.h, CustomMaskType::CausalFromTopLeft


def varlen(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None, softcap: float | None
) -> Tensor:
    """torch.nn.attention.varlen. Raises NotImplementedError for a cap, or where torch has no such function."""
    attend = _varlen_attn()
    if attend is None or softcap is not None:
        raise NotImplementedError("this torch has no varlen_attn with windows, shared keys and a scale")
    batch = mask.batch
    most, starts = batch.max_document, batch.cu_seqlens
    q, k, v = (flat(one) for one in (query, key, value))
    window = varlen_window(mask)
    output = attend(q, k, v, starts, starts, most, most, window_size=window, enable_gqa=True, scale=scale)
    return output.view(*output_shape(query))  # type: ignore[no-any-return]


def varlen_window(mask: DocumentMask) -> tuple[int, int]:
    """Tokens before and behind a token that it sees, as flash kernels take them: -1 is all."""
    return (-1 if _sees_all(mask) else _window(mask) - 1), 0


@cache
def _varlen_attn() -> Any:
    """torch 2.10's takes neither windows nor shared keys; None where it is so, or there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    taken = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= taken.keys() else None


def has_varlen() -> bool:
    """Whether this torch has what `varlen` calls (its build may still have no kernel behind it)."""
    return _varlen_attn() is not None


def efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None, softcap: float | None
) -> Tensor:
    """aten's memory-efficient kernel over `cu_seqlens`. Raises NotImplementedError for a cap.

    It keeps and takes as much for each document as for the longest of a call: documents of like length share a call.
    """
    if softcap is not None:
        raise NotImplementedError("the memory-efficient kernel has no cap")

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        return _by_starts(q, k, v, mask, starts, longest, scale)

    return by_length_classes(query, key, value, mask, attend)


def by_length_classes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: DocumentMask,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor],
) -> Tensor:
    """`attend` (query, key, value (N, heads, D), where documents start, the longest) for documents of like length."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    q, k, v = (flat(one) for one in (query, key, value))
    lengths, classes = mask.batch.document_lengths, _length_classes(mask)
    if not classes:
        assert mask.batch.cu_seqlens is not None
        return attend(q, k, v, mask.batch.cu_seqlens, max(lengths)).view(*output_shape(query))
    pieces = [torch.split(one, list(lengths)) for one in (q, k, v)]
    outputs: list[Tensor] = [q] * len(lengths)
    for one in classes:
        q, k, v = (torch.cat([documents[at] for at in one.members]) for documents in pieces)
        output = attend(q, k, v, one.starts, one.longest)
        for at, part in zip(one.members, torch.split(output, [lengths[at] for at in one.members]), strict=True):
            outputs[at] = part
    return torch.cat(outputs).view(*output_shape(query))


def _by_starts(
    q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, starts: Tensor, longest: int, scale: float | None
) -> Tensor:
    window = mask.window if mask.window is not None and mask.window < longest else None
    if q.is_meta:  # whose form of the backward pass takes neither; the tensors are the same
        window = scale = None
    states = (one.unsqueeze(0) for one in (q, k, v))
    output = torch.ops.aten._efficient_attention_forward(
        *states, None, starts, starts, longest, longest, 0.0, _CAUSAL, True, scale=scale, window_size=window
    )[0]
    return output.squeeze(0)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _LengthClass:
    """Documents of a micro-batch, by number, of which none is twice as long as another, or all are short."""

    members: tuple[int, ...]
    starts: Tensor
    longest: int


def _length_classes(mask: DocumentMask) -> tuple[_LengthClass, ...]:
    """Classes with an end at each power of 2 from EFFICIENT_ROWS; () where all are of one. From facts of the host.

    So what the kernel counts in is 2 N positions at most and EFFICIENT_ROWS for each document. On meta, where
    documents stand for any of so many tokens, it is that.
    """
    known = vars(mask).get("classes")
    if known is None:
        batch, by_end = mask.batch, dict[int, list[int]]()
        for number, length in enumerate(batch.document_lengths):
            by_end.setdefault(max(EFFICIENT_ROWS, 1 << (length - 1).bit_length()), []).append(number)
        device = batch.input_ids_BS.device
        if device.type == "meta" and not batch.single:
            everyone = tuple(range(len(batch.document_lengths)))
            count = 2 * -(-batch.tokens // EFFICIENT_ROWS) + len(everyone)
            starts = torch.empty(count + 1, dtype=torch.int32, device=device)
            known = (_LengthClass(everyone, starts, EFFICIENT_ROWS),)
        else:
            found = by_end.values() if len(by_end) > 1 else ()
            known = tuple(_length_class(members, batch.document_lengths, device) for members in found)
        vars(mask)["classes"] = known
    return known  # type: ignore[no-any-return]


def _length_class(members: list[int], lengths: tuple[int, ...], device: torch.device) -> _LengthClass:
    own = [lengths[at] for at in members]
    starts = torch.tensor([0, *accumulate(own)], dtype=torch.int32).to(device, non_blocking=True)
    return _LengthClass(tuple(members), starts, max(own))


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None, softcap: float | None
) -> Tensor:
    """Each document by itself, by sdpa, or by its scores where they are capped."""
    lengths, window = mask.batch.document_lengths, mask.window
    if softcap is None and (query.is_cpu or query.is_meta) and _sees_all(mask) and query.shape[-1] == value.shape[-1]:
        output = cpu_attention.by_documents(flat(query), flat(key), flat(value), lengths, scale)
        return output.view(*output_shape(query))
    parts = []
    for q, k, v in zip(*(torch.split(flat(one), list(lengths)) for one in (query, key, value)), strict=True):
        alone = (q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        band = None if window is None or len(q) <= window else causal_band(len(q), window, q.device)
        if softcap is not None:
            seen = causal_band(len(q), len(q), q.device) if band is None else band
            output = by_scores(*alone, seen, scale, softcap)
        else:
            shared = q.shape[1] != k.shape[1]
            output = scaled_dot_product_attention(*alone, band, is_causal=band is None, scale=scale, enable_gqa=shared)
        parts.append(output[0].transpose(0, 1))
    return torch.cat(parts).view(*output_shape(query))


def causal_band(length: int, window: int, device: torch.device) -> Tensor:
    """(S, S): true where key j is among the `window` tokens up to query i."""
    places_S = torch.arange(length, device=device)
    behind_SS = places_S[:, None] - places_S
    return (behind_SS >= 0) & (behind_SS < window)


def by_scores(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention by its definition, (B, heads, S, D): capped scores where `seen`, softmax in fp32, weighted sum."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~seen, lowest).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None, softcap: float | None
) -> Tensor:
    """torch's flex_attention, compiled (on a CPU as it is: its reference there computes S × S scores).

    Raises torch's FailOnRecompileLimitHit where it would go on uncompiled, with S × S scores.
    """
    length = query.shape[2]
    over = -length % FLEX_BLOCK
    query, key, value = (pad(one, (0, 0, 0, over)) if over else one for one in (query, key, value))
    if query.is_meta:  # it knows none; flash attention keeps the same tensors, and its scratch is the larger
        output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)[0]
        return output.transpose(1, 2)[:, :length]  # type: ignore[no-any-return]
    capped = None if softcap is None else partial(_capped, softcap=softcap)
    with _many_variants():
        blocks = _block_mask(mask, over, _compiles(query))
        output = _flex_attention(_compiles(query))(query, key, value, capped, blocks, scale, enable_gqa=True)
    return output[:, :, :length].transpose(1, 2).contiguous()  # type: ignore[no-any-return]


def _compiles(states: Tensor) -> bool:
    return not states.is_cpu


def _many_variants() -> AbstractContextManager[Any]:
    """Compiled once for each kind of window, mode of gradients and of exactness, and shape class: more than the 8 after
    which torch says a line and goes on uncompiled. Past MOST_VARIANTS it fails instead."""
    config = torch._dynamo.config
    wanted: dict[str, Any] = {"recompile_limit": MOST_VARIANTS, "fail_on_recompile_limit_hit": True}
    return config.patch(**{name: value for name, value in wanted.items() if hasattr(config, name)})  # type: ignore[no-any-return]


@cache
def _flex_attention(compiled: bool) -> Any:
    """Sizes are left to torch: the first is compiled as it is, the second for all."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


@cache
def _create_block_mask(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if compiled else create_block_mask


def _block_mask(mask: DocumentMask, over: int, compiled: bool) -> Any:
    """Which blocks of queries and keys meet at all: made for the first layer, kept with the mask for the others.

    `over` are positions behind a row's end: a document of their own.
    """
    known = vars(mask).get("blocks")
    if known is None:
        batch, window = mask.batch, mask.window
        documents_BS = pad(batch.document_ids_BS, (0, over), value=-1)

        def seen(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
            together = (documents_BS[b, q] == documents_BS[b, k]) & (q >= k)
            return together if window is None else together & (q - k < window)

        rows, length = documents_BS.shape
        device = str(documents_BS.device)
        known = vars(mask)["blocks"] = _create_block_mask(compiled)(seen, rows, None, length, length, device)
    return known


def _capped(score: Tensor, *_: Tensor, softcap: float) -> Tensor:
    return torch.tanh(score / softcap) * softcap


def _sees_all(mask: DocumentMask) -> bool:
    return mask.window is None or mask.window >= mask.batch.max_document


def _window(mask: DocumentMask) -> int:
    assert mask.window is not None
    return mask.window


def flat(states: Tensor) -> Tensor:
    """(B, heads, S, D) as (N, heads, D)."""
    return states.transpose(1, 2).flatten(0, 1)


def output_shape(query: Tensor) -> tuple[int, int, int, int]:
    rows, heads, length, width = query.shape
    return rows, length, heads, width


KERNELS: dict[str, Kernel] = {"varlen": varlen, "efficient": efficient, "flex": flex, "one by one": one_by_one}
CAPPED = ("flex", "one by one")  # those that cap scores
