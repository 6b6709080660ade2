"""One weight to and from 4 bit, as bitsandbytes does it; on the CPU by a faster way to the same bits.

A weight is cut into blocks of 64 values; each is divided by its largest magnitude (absmax) and every value becomes the
index of the nearest of 16 numbers. Double quantization keeps the absmax values themselves in 8 bit: less their mean, in
blocks of 256 (QLoRA, arXiv:2305.14314, sections 3 and appendix E).

Large weights go through in blocks of whole rows, so that no second copy of them ever exists. The result is the one that
bitsandbytes gives for the whole: a block of rows always ends where a block of 64 ends, and the nested statistics are
taken over all absmax values at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.device import is_card, on_default_stream
from qlora.errors import ModelError, foreign_failures
from qlora.model.base_folder import BaseFolder
from qlora.model.tensors import read_tensor
from qlora.third_party import import_bitsandbytes

BLOCK = 64
NESTED_BLOCK = 256
# Of what makes the bytes below: raised with whatever gives a weight other ones, as bases are kept (`base_cache`).
QUANTIZER = 1
# Values in flight at a time: at most 16 MiB as they are read.
VALUES_PER_BLOCK = 1 << 22
# Values that a thread encodes at a time on the CPU: 128 KiB of fp32; more, and torch would split its part once more.
_CHUNK_VALUES = 1 << 15

_SMALLEST = np.float32(1e-38)  # the absmax that bitsandbytes divides by at least


@dataclass(frozen=True)
class Quantized:
    """A weight in 4 bit: `data` is uint8 of shape (ceil(numel / 2), 1), `state` bitsandbytes' QuantState."""

    data: Tensor
    state: Any


def quantize_rows(
    read_rows: Callable[[int, int], Tensor],
    shape: tuple[int, ...],
    quant_type: str,
    double_quant: bool,
    device: torch.device,
    values_per_block: int = VALUES_PER_BLOCK,
) -> Quantized:
    """A weight of `shape` that `read_rows(start, end)` hands out in blocks of rows, quantized on `device`.

    Bit-identical to `bitsandbytes.functional.quantize_4bit` of the whole weight. `quant_type` is "nf4" or "fp4";
    `double_quant` keeps the block constants in 8 bit.
    """
    bnb = import_bitsandbytes().functional
    rows, columns = shape[0], math.prod(shape[1:])
    step = rows_in_block(columns, values_per_block)
    data = torch.empty((rows * columns + 1) // 2, 1, dtype=torch.uint8, device=device)
    host = device if device.type == "meta" else torch.device("cpu")  # where the constants get theirs
    absmax = torch.empty(-(-rows * columns // BLOCK), dtype=torch.float32, device=host)
    encode = _encode_on_card if is_card(device) else _encode_by_kernel if device.type == "meta" else _encode_on_cpu
    dtype = None
    for start in range(0, rows, step):
        block = read_rows(start, min(rows, start + step)).to(device).contiguous()
        codes, maxima = encode(block, quant_type)
        begin = start * columns
        data[begin // 2 : begin // 2 + codes.numel()] = codes.view(-1, 1)
        absmax[begin // BLOCK : begin // BLOCK + maxima.numel()] = maxima
        dtype = block.dtype
        del block, codes
    assert dtype is not None, "a weight without rows"
    state = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=bnb.get_4bit_type(quant_type, device=host),
        quant_type=quant_type,
    )
    if double_quant:
        # By the CPU for every device: a GPU sums the mean in another order, which moves codes of the constants, and a
        # base would have other bytes there (0.9 M constants of an 8B model's largest layer: 20 ms).
        state.offset = absmax.mean()
        state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=NESTED_BLOCK)
        state.nested = True
    state.to(device)
    return Quantized(data, state)


def _encode_on_card(block: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """What the kernel gives, but for blocks whose largest magnitude it cannot divide by: those as on the CPU.

    It multiplies by 1 / absmax, and where that is infinite every code is that of -1: with double quantization, whose
    constants are rounded, no zero would be one any more.
    """
    codes, absmax = _encode_by_kernel(block, quant_type)
    codes, values = codes.view(-1), block.reshape(-1)
    whole = values.numel() // BLOCK
    nothing = absmax == 0
    zero = int(_pack(np.zeros(2, np.float32), quant_type, np.empty((2, 2), np.uint8))[0])
    codes[: whole * BLOCK // 2].view(-1, BLOCK // 2).masked_fill_(nothing[:whole, None], zero)
    if whole < len(absmax):  # the last block is not full
        codes[whole * BLOCK // 2 :].masked_fill_(nothing[-1], zero)
        absmax[-1].clamp_(min=float(_SMALLEST))
    return codes, absmax


def _encode_by_kernel(block: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    with on_default_stream(block.device):
        codes, state = import_bitsandbytes().functional.quantize_4bit(block, blocksize=BLOCK, quant_type=quant_type)
    return codes, state.absmax


def _encode_on_cpu(block: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Packed codes and absmax, equal to those of bitsandbytes, which searches each value in a table on the CPU.

    A code is the number of midpoints between neighbouring values that lie below a scaled value: fifteen comparisons of
    whole chunks, which numpy does in vector instructions (torch's comparison takes five times as long). Chunks stay in
    a core's cache, and each of torch's threads has its own part of the block. (1024 x 4096 in bf16, NF4, one
    thread of an EPYC: 310 M values a second, bitsandbytes 29.)
    """
    values = block.reshape(-1)
    whole = values.numel() // BLOCK * BLOCK
    codes, absmax = np.empty((values.numel() + 1) // 2, np.uint8), np.empty(-(-values.numel() // BLOCK), np.float32)
    threads = min(torch.get_num_threads(), -(-whole // _CHUNK_VALUES))
    chunk = _CHUNK_VALUES if threads > 1 else 4 * _CHUNK_VALUES

    def encode(first: int, last: int) -> None:
        scratch = np.empty((2, chunk), np.uint8)
        for start in range(first, last, chunk):
            end = min(start + chunk, last)
            blocks = values[start:end].float().view(-1, BLOCK)
            largest = torch.maximum(blocks.amax(dim=1), blocks.amin(dim=1).neg_()).numpy()
            absmax[start // BLOCK : end // BLOCK] = largest
            scaled = blocks.numpy()
            with np.errstate(invalid="ignore"):
                np.multiply(scaled, np.reciprocal(np.maximum(largest, _SMALLEST))[:, None], out=scaled)
            codes[start // 2 : end // 2] = _pack(scaled.reshape(-1), quant_type, scratch[:, : end - start])

    if threads > 1:
        share = -(-whole // threads // _CHUNK_VALUES) * _CHUNK_VALUES
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first: encode(first, min(whole, first + share)), range(0, whole, share)))
    else:
        encode(0, whole)
    if whole < values.numel():  # the last block is not full: bitsandbytes divides there, and keeps the bounded absmax
        rest = values[whole:].float().numpy()
        absmax[-1] = max(np.abs(rest).max(), _SMALLEST)
        scaled = np.append(rest / absmax[-1], np.zeros(rest.size % 2, np.float32))
        codes[whole // 2 :] = _pack(scaled, quant_type, np.empty((2, scaled.size), np.uint8))
    if not np.isfinite(absmax).all():  # what NaN and infinity become is left to bitsandbytes
        return _encode_by_kernel(block, quant_type)
    return torch.from_numpy(codes), torch.from_numpy(absmax)


def _pack(scaled: Any, quant_type: str, scratch: Any) -> Any:
    """Codes of scaled values (float32, an even number), two a byte, the first in the upper four bits.

    `scratch` is uint8 of two times as many values.
    """
    midpoints, packed_order = _tables(quant_type)
    above, count = scratch
    np.greater(scaled, midpoints[0], out=count.view(np.bool_))
    for midpoint in midpoints[1:]:
        np.greater(scaled, midpoint, out=above.view(np.bool_))
        np.add(count, above, out=count)
    pairs = count.view("<u2")
    packed = (pairs << 4 | pairs >> 8).astype(np.uint8)
    return packed if packed_order is None else packed_order[packed]


@cache
def _tables(quant_type: str) -> tuple[Any, Any]:
    """The 15 midpoints in rising order, and for values that are not in that order a table over packed bytes."""
    values, order = import_bitsandbytes().functional.get_4bit_type(quant_type, device="cpu").sort(stable=True)
    ranks = order.numpy().astype(np.uint8)
    table = (ranks[:, None] << 4 | ranks[None, :]).reshape(-1)
    return ((values[:-1] + values[1:]) / 2).numpy(), None if quant_type == "nf4" else table


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


def row_unit(quantized: Quantized) -> int:
    """The smallest number of rows that ends where a block of values ends: what `row_reader` takes multiples of."""
    state = quantized.state
    return int(state.blocksize) // math.gcd(int(state.blocksize), math.prod(state.shape[1:]))


def row_reader(quantized: Quantized, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """A function from `start` and `end` to these rows of the weight in `dtype`, the same as `dequantize` gives.

    `start` is a multiple of `row_unit`. The block constants are put into fp32 once (a 32nd of the 16-bit weight).
    """
    bnb = import_bitsandbytes().functional
    state = copy.copy(quantized.state)
    if state.nested:
        constants = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.absmax, state.nested, state.offset, state.state2 = constants.float(), False, None, None
    absmax, codes, shape = state.absmax, quantized.data.view(torch.uint8).reshape(-1), tuple(state.shape)
    state.dtype = dtype
    columns = math.prod(shape[1:])

    def read(start: int, end: int) -> Tensor:
        assert start * columns % state.blocksize == 0, "rows that begin inside a block"
        state.shape = torch.Size((end - start, *shape[1:]))
        state.absmax = absmax[start * columns // state.blocksize : -(-end * columns // state.blocksize)]
        part = codes[start * columns // 2 : (end * columns + 1) // 2]
        return bnb.dequantize_4bit(part, state).reshape(state.shape)  # type: ignore[no-any-return]

    return read


def product_4bit(
    inputs: Tensor,
    codes: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """bitsandbytes' operator gemm_4bit in steps that a dispatch mode sees, as it is computed for more than a few rows.

    The whole weight is dequantized to the inputs' type for a moment (backends/default/ops.py): what is computed with is
    what a merge on nf4 writes. The product is computed in `dtype`, and comes back in the inputs' type.
    """
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        constants = (absmax_8bit, absmax, absmax_code, NESTED_BLOCK, torch.float32)
        absmax = ops.dequantize_blockwise.default(*constants) + absmax_offset
    weight = ops.dequantize_4bit.default(codes, absmax, blocksize, quant_type, shape, inputs.dtype)
    wide_bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(inputs.to(dtype), weight.to(dtype), wide_bias).to(inputs.dtype)


def is_stored_4bit(base: BaseFolder, tensor: str) -> bool:
    """Whether the checkpoint's `tensor` is bitsandbytes' packed 4-bit data."""
    return any(f"{tensor}.quant_state.bitsandbytes__{kind}" in base.tensors for kind in ("nf4", "fp4"))


def stored_4bit(
    base: BaseFolder, tensor: str, device: torch.device, read: Callable[[str], Tensor] | None = None
) -> Quantized:
    """The checkpoint's 4-bit weight `tensor` as bitsandbytes wrote it, each tensor by `read`. Raises ModelError."""
    bnb, read = import_bitsandbytes(), read or (lambda name: read_tensor(base.tensors[name]))
    statistics = [name for name in base.tensors if name.startswith(f"{tensor}.")]
    quantization = {name.removeprefix(f"{tensor}."): read(name) for name in statistics}
    data = read(tensor)
    with foreign_failures() as failure:
        state = bnb.functional.QuantState.from_dict(quantization, device=device)
        check_state(state, data)
    if failure.error:
        what = f"{base.name}: the 4-bit statistics of {tensor} cannot be read ({failure.reason})"
        raise ModelError(what, "get a clean copy of the model, or name the original one") from failure.error
    return Quantized(data.to(device), state)


def check_state(state: Any, data: Tensor) -> None:
    """Raises ValueError where sizes disagree: bitsandbytes' kernels trust them, and would read past the end."""
    values = math.prod(state.shape)
    sizes = [("codes", data.nbytes, -(-values // 2)), ("code table", state.code.numel(), 16)]
    sizes.append(("block constants", state.absmax.numel(), -(-values // state.blocksize)))
    kinds = [state.code.dtype, state.absmax.dtype if not state.nested else state.offset.dtype]
    if state.nested:
        blocks = -(-state.absmax.numel() // state.state2.blocksize)
        sizes += [("nested constants", state.state2.absmax.numel(), blocks)]
        sizes += [("nested table", state.state2.code.numel(), 256)]
        kinds += [state.state2.absmax.dtype, state.state2.code.dtype]
    for what, found, wanted in sizes:
        if found != wanted:
            raise ValueError(f"{found:,} {what} for {values:,} values, not {wanted:,}")
    nested_bytes = not state.nested or state.absmax.dtype == torch.uint8
    compute = state.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if set(kinds) != {torch.float32} or not nested_bytes or not compute:
        raise ValueError("numbers of an unexpected type")
