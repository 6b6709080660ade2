"""Experts that are published in MXFP4 (gpt-oss) into ggml's form of it: the same codes and scales in another order.

On both sides 32 values share a power of two. Published are codes (E, out, in / 32, 16), two values a byte, the earlier
one in its low four bits, and scales (E, out, in / 32); ggml has 17 bytes a block, the scale first, then values j and
j + 16 in a byte (ggml-common.h, block_mxfp4). Nothing is rounded: what is unpacked again is what was published.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qlora.export.gguf.family import GgufTensor
from qlora.export.merge.merge import MergedTensor
from qlora.model.mxfp4 import FORMS

SCALES = FORMS[1]


def repack(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 (n, out, in / 32 * 17) of published codes (n, out, in / 32, 16) and scales (n, out, in / 32)."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    pairs = codes[..., :16] | codes[..., 16:] << 4
    return torch.cat((scales[..., None], pairs), dim=-1).flatten(-2)


def unpack(stored: Tensor, form: str) -> Tensor:
    """The published codes, or scales, of ggml's bytes (..., in / 32 * 17): what `repack` was given."""
    whole = stored.reshape(*stored.shape[:-1], -1, 17)
    scales, pairs = whole[..., 0], whole[..., 1:]
    codes = torch.cat((pairs & 15, pairs >> 4), dim=-1)
    found: Tensor = scales if form == SCALES else codes[..., 0::2] | codes[..., 1::2] << 4
    return found


def experts_of(tensor: GgufTensor, blocks: MergedTensor, scales: MergedTensor) -> Iterator[Tensor]:
    """ggml's bytes (1, rows, in / 32 * 17) of each expert of a tensor, one after the other."""
    for codes, exponents in zip(_one_by_one(blocks), _one_by_one(scales), strict=True):
        yield repack(tensor.to_gguf(codes), tensor.to_gguf(exponents))


def _one_by_one(tensor: MergedTensor) -> Iterator[Tensor]:
    for block in tensor.blocks(1):
        yield from torch.split(block, 1)
