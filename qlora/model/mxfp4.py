"""Experts as gpt-oss is published: MXFP4, 4.25 bit a value, held as they lie in the files and never rounded again.

32 values along the input share a scale, a power of two; a value is one of sixteen numbers times it (OCP Microscaling
Formats 1.0, sections 5.2 and 5.3: E8M0 scales, E2M1 elements). On the disk a projection has two tensors:

    …_blocks  uint8 (E, out, in / 32, 16)  two values a byte, the earlier one in its low four bits
    …_scales  uint8 (E, out, in / 32)      exponent plus 127

Both are held as they are, (E, out, in) like a slab in NF4. Each value is exact in bf16: two significant bits. NF4 of
these values would be off by 7 % more (0.074 of their norm). Rows of gate and up alternate, which is the module's own
affair (`_apply_gate`): nobody here looks at them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from qlora.model.mxfp4_config import BLOCK
from qlora.step.experts import Packed

# The largest scale of which every code is finite in bf16: 6 is 1.5 * 2^2, and bf16 ends behind 1.99 * 2^127. A scale of
# 255 is not a number at all (5.2 and 5.4 of the specification).
MOST_SCALE = 252
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; with the fourth bit their negatives, -0 too
FORMS = ("blocks", "scales")  # of a projection's tensors, by the ends of their names
# Places in a table, four bytes for each byte of codes, exist of so many at a time: two experts of gpt-oss' gate and up
# (33 MiB each), where those of a chunk (`step/experts.py`) would be as large as its weights.
PLACES_BYTES = 64 << 20


class Mxfp4Stack(nn.Module):
    """The experts of one projection in MXFP4.

    codes   (E, out * in / 2) uint8, two values a byte
    scales  (E, out * in / 32) uint8
    table   (16,) fp32: what a code means

    `by`: who multiplies with them (`step/experts.py`, PackedStack).
    """

    IN_BLOB: ClassVar[tuple[str, ...]] = ("codes", "scales")  # weights, which may be elsewhere
    TABLES: ClassVar[tuple[str, ...]] = ("table",)  # what all experts share

    codes: Tensor
    scales: Tensor
    table: Tensor
    block = BLOCK

    def __init__(self, shape: tuple[int, int, int], by: str | None = None) -> None:
        super().__init__()
        self.shape, self.quant_type, self.by = shape, "mxfp4", by
        count, values = shape[0], math.prod(shape[1:])
        assert shape[2] % BLOCK == 0, "a row that ends inside a block"
        self.blocks = values // BLOCK
        self.sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((count, values // 2), torch.uint8),
            "scales": ((count, self.blocks), torch.uint8),
            "table": ((16,), torch.float32),
        }
        for name, (size, dtype) in self.sizes.items():  # of no bytes, also to who counts storages on meta
            self.register_buffer(name, torch.empty((), dtype=dtype, device="meta").expand(size), persistent=False)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(size) * dtype.itemsize for size, dtype in self.sizes.values())

    def allocate(self, device: torch.device) -> None:
        """Room for all experts on `device`, without values, and the table."""
        for name in self.IN_BLOB:
            size, dtype = self.sizes[name]
            self._buffers[name] = torch.zeros(size, dtype=dtype, device=device)
        self._buffers["table"] = _table(device)

    def take(self, buffers: Mapping[str, Tensor]) -> None:
        """Have these buffers as they are."""
        self._buffers.update(buffers)

    def put(self, expert: int, form: str, stored: Tensor) -> None:
        """Give an expert its `_blocks` (out, in / 32, 16) or its `_scales` (out, in / 32)."""
        held = self.codes if form == "blocks" else self.scales
        held[expert] = stored.reshape(-1)

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Experts `first` up to `last` (not included), (n, out, in): code times scale, rounded once, if at all."""
        weights = torch.empty((last - first, *self.shape[1:]), dtype=dtype, device=self.codes.device)
        each = max(1, PLACES_BYTES // (4 * self.codes.shape[1]))
        both = _pairs(self.table, dtype)
        for start in range(first, last, each):
            end = min(last, start + each)
            room = weights[start - first : end - first]
            _decode_into(room, self.codes[start:end], self.scales[start:end], both)
        return weights

    def packed(self) -> Packed:
        """All experts as the kernel decodes them, which makes powers of two of their scales itself."""
        return Packed(self.codes, self.scales, self.table, False)


def _table(device: torch.device) -> Tensor:
    return torch.tensor([*VALUES, *(-value for value in VALUES)]).to(device)


def _pairs(table: Tensor, dtype: torch.dtype) -> Tensor:
    """What each byte of two codes means in `dtype`, (256,) of numbers twice as wide: a place gives two values.

    Doubled: by halves of the scales no power of two that a value needs is beyond fp32 (ggml does so too, ggml-common.h,
    kvalues_mxfp4).
    """
    both = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1).mul_(2).to(dtype)
    return both.view(torch.int64 if dtype == torch.float32 else torch.int32).view(-1)


def _decode_into(room: Tensor, codes: Tensor, scales: Tensor, both: Tensor) -> None:
    """Fill `room` (n, out, in), contiguous, with what `codes` and `scales` say; `both` as `_pairs` makes it."""
    torch.index_select(both, 0, codes.reshape(-1).int(), out=room.view(-1).view(both.dtype))
    factors = _halves(scales.reshape(-1, 1))
    # Powers of two are exact in bf16; fp16 ends too early for them.
    room.view(-1, BLOCK).mul_(factors if room.dtype == torch.float16 else factors.to(room.dtype))


def decoded(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights (n, out, in) of stored tensors: blocks (n, out, in / 32, 16), scales (n, out, in / 32)."""
    stack = Mxfp4Stack((blocks.shape[0], blocks.shape[1], blocks.shape[2] * BLOCK))
    codes, constants = (one.reshape(len(one), -1) for one in (blocks, scales))
    stack.take({"codes": codes, "scales": constants, "table": _table(blocks.device)})
    return stack.read(0, len(blocks), dtype)


def _halves(scales: Tensor) -> Tensor:
    """2^(scale - 128) in fp32, by its bits: exact on every device, as a power function need not be.

    The exponent's bits are a scale's own, less one; 2^-127 and 2^-128 are below what an exponent says.
    """
    bits = scales.int()
    return torch.where(bits < 2, (bits + 1) << 21, (bits - 1) << 23).view(torch.float32)


def stored_shape(shape: tuple[int, int, int], form: str) -> tuple[int, ...]:
    """The shape in the files of a projection (E, out, in) of one of FORMS."""
    count, out, width = shape
    return (count, out, width // BLOCK, BLOCK // 2) if form == "blocks" else (count, out, width // BLOCK)
