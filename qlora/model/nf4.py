"""One weight to and from 4 bit, by bitsandbytes' kernels, and the same in plain torch to check them.

A weight is cut into blocks of 64 values; each is divided by its largest magnitude (absmax) and every value becomes the
index of the nearest of 16 numbers. Double quantization holds the absmax values themselves in 8 bit: less their mean, in
blocks of 256 (QLoRA, arXiv:2305.14314, sections 3 and appendix E).

Large weights go through in blocks of whole rows, so that no second copy of them ever exists. The result is the one that
bitsandbytes gives for the whole: a block of rows always ends where a block of 64 ends, and the nested statistics are
taken over all absmax values at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.quiet import import_bitsandbytes

BLOCK = 64
NESTED_BLOCK = 256
# Values in flight at a time. bitsandbytes' CPU kernel needs some 25 bytes of scratch for each: 100 MB.
VALUES_PER_BLOCK = 1 << 22

# QLoRA appendix E; bitsandbytes/functional.py, get_4bit_type("nf4").
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa, over the largest (12): bitsandbytes/functional.py, get_4bit_type("fp4").
FP4_VALUES = tuple(
    sign * value / 12.0 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)


@dataclass(frozen=True)
class Quantized:
    """A weight in 4 bit: `data` is uint8 of shape (ceil(numel / 2), 1), `state` bitsandbytes' QuantState."""

    data: Tensor
    state: Any

    @property
    def nbytes(self) -> int:
        """Bytes of codes and block constants; the value tables, 1 KiB a weight, come on top."""
        nested = [self.state.state2.absmax] if self.state.nested else []
        return sum(int(tensor.nbytes) for tensor in (self.data, self.state.absmax, *nested))


def quantize(weight: Tensor, quant_type: str, double_quant: bool, device: torch.device) -> Quantized:
    """Quantizes `weight` (out, in) on `device`, bit-identical to `bitsandbytes.functional.quantize_4bit` of the whole.

    `quant_type` is "nf4" or "fp4"; `double_quant` holds the block constants in 8 bit.
    """
    return quantize_rows(lambda start, end: weight[start:end], tuple(weight.shape), quant_type, double_quant, device)


def quantize_rows(
    read_rows: Callable[[int, int], Tensor],
    shape: tuple[int, ...],
    quant_type: str,
    double_quant: bool,
    device: torch.device,
    values_per_block: int = VALUES_PER_BLOCK,
) -> Quantized:
    """Like `quantize`, of a weight of `shape` that `read_rows(start, end)` hands out in blocks of rows."""
    bnb = import_bitsandbytes().functional
    rows, columns = shape[0], math.prod(shape[1:])
    step = rows_in_block(columns, values_per_block)
    data = torch.empty((rows * columns + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-rows * columns // BLOCK), dtype=torch.float32, device=device)
    state = None
    for start in range(0, rows, step):
        block = read_rows(start, min(rows, start + step)).to(device).contiguous()
        codes, state = bnb.quantize_4bit(block, blocksize=BLOCK, quant_type=quant_type)
        begin = start * columns
        data[begin // 2 : begin // 2 + codes.shape[0]] = codes
        absmax[begin // BLOCK : begin // BLOCK + state.absmax.numel()] = state.absmax
        del block, codes
    assert state is not None, "a weight without rows"
    state.shape = torch.Size(shape)
    state.absmax = absmax
    if double_quant:
        state.offset = absmax.mean()
        state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=NESTED_BLOCK)
        state.nested = True
    return Quantized(data, state)


def rows_in_block(columns: int, values_per_block: int = VALUES_PER_BLOCK) -> int:
    """Rows to take at a time: about `values_per_block` values, and a multiple of 64 of them whatever `columns` is."""
    unit = BLOCK // math.gcd(BLOCK, columns)
    return max(1, values_per_block // (unit * columns)) * unit


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`: code value times block constant, in fp32, rounded once."""
    bnb = import_bitsandbytes().functional
    state = copy.copy(quantized.state)
    state.dtype = dtype
    weight: Tensor = bnb.dequantize_4bit(quantized.data, state)
    return weight.reshape(state.shape)


def values_of(quant_type: str) -> Tensor:
    """The 16 numbers that the codes stand for, in the order of the codes, float32."""
    return torch.tensor(NF4_VALUES if quant_type == "nf4" else FP4_VALUES, dtype=torch.float32)


def reference_quantize(weight: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes (uint8, numel) and absmax (float32, one a block of 64) of `weight`, in plain torch.

    The nearest value is found by the midpoints between neighbours; a value on a midpoint takes the lower one, as
    torch.bucketize does.
    """
    flat = weight.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).view(-1)[: flat.numel()]
    values, order = values_of(quant_type).sort(stable=True)
    midpoints = (values[:-1] + values[1:]) / 2
    return order[torch.bucketize(scaled, midpoints)].to(torch.uint8), absmax


def reference_dequantize(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], quant_type: str) -> Tensor:
    """The weight that codes and absmax stand for, float32, in plain torch."""
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return (values_of(quant_type)[codes.long()] * scale).view(shape)


def unpack(data: Tensor, numel: int) -> Tensor:
    """One code a byte from bitsandbytes' two: the first value of a pair is in the upper four bits."""
    pairs = data.view(torch.uint8).reshape(-1)
    return torch.stack((pairs >> 4, pairs & 0xF), dim=1).reshape(-1)[:numel]
