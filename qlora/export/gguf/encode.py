"""Rows of float32 to the bytes of a GGUF tensor.

F32, F16, BF16 and Q8_0 are ours, so that a plain install writes them; their bytes equal ggml's. All other types go
through ggml. A row is encoded by itself, so a weight may come in any blocks of whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from qlora.errors import ExportError
from qlora.export.llama_cpp.library import Ggml

# Rounded to the nearest, halves to the even neighbour, by torch as by ggml_fp32_to_fp16 and ggml_fp32_to_bf16.
_SIXTEEN_BIT = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
NATIVE = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, *_SIXTEEN_BIT})
# Values taken at a time by our encoders: 4 MiB of float32, and twice that as scratch, stay in a core's cache while
# Q8_0 passes over them. Measured on 2 idle cores: 1,090 million values/s; 170 with pieces of 32 MiB, 210 with 128 KiB.
NATIVE_PIECE = 1 << 20
# Values that a thread hands to ggml at a time: small enough that all threads end together.
GGML_PIECE = 1 << 17
# The largest float32 below one half. x + this, cut off, is C's roundf, halves away from zero; with 0.5 itself,
# 0.49999997 + 0.5 rounds up to 1.0. torch.round takes halves to the even neighbour.
BELOW_HALF = 0.5 - 2.0**-25
# From 65520 on float16 is infinite. Q8_0 holds the largest of a block over 127 in it; that division may round up.
_LIMITS = {GGMLQuantizationType.F16: 65520.0, GGMLQuantizationType.Q8_0: 127 * 65519.0}


@dataclass(frozen=True)
class Encoding:
    """Rows on their way to bytes: `out` is what they will be, when all `pieces` are done."""

    out: np.ndarray
    pieces: Sequence[Future[bool]] = ()
    fault: str = ""

    def result(self) -> np.ndarray:
        """The bytes. Raises ExportError where a piece of them could not be written."""
        if not all(piece.result() for piece in self.pieces):
            raise ExportError(self.fault, "export as bf16 or f32, and check the base and the importance matrix")
        return self.out


@contextmanager
def encoding_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch computes with; what they have not begun when the block is left is not done."""
    pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="encode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def encode(
    rows_RC: Tensor,
    kind: GGMLQuantizationType,
    library: Ggml | None = None,
    importance_C: np.ndarray | None = None,
    name: str = "a weight",
) -> np.ndarray:
    """The bytes of float32 rows on the CPU: uint8 of shape (rows, bytes a row), or (bytes,) of a 1-D tensor. F32 is a
    view of `rows_RC`, all else a copy.

    `library` may be None for the types of NATIVE. `importance_C`, one float32 a column, weighs the errors of K-, IQ-
    and legacy types; ours ignore it, as ggml's do. Raises ExportError, naming `name`, for values that are not finite
    or too large for `kind`, and for an importance of another length.
    """
    with encoding_threads() as pool:
        return begin(rows_RC, kind, (library, importance_C), name, pool).result()


def begin(
    rows_RC: Tensor,
    kind: GGMLQuantizationType,
    how: tuple[Ggml | None, np.ndarray | None],
    name: str,
    pool: Executor,
) -> Encoding:
    """`encode`, with the library and the importance as `how`; what ggml encodes is done by the threads of `pool`.

    Until it is done `rows_RC` is left as it is. What is wrong with the rows is raised at once.
    """
    assert rows_RC.dtype == torch.float32, f"{name} is {rows_RC.dtype}"
    columns = rows_RC.shape[-1]
    block, size = GGML_QUANT_SIZES[kind]
    assert columns % block == 0, f"{name}: rows of {columns} values cannot be {kind.name}"
    rows = rows_RC.contiguous().view(-1, columns)
    if kind != GGMLQuantizationType.Q8_0:  # whose blocks' largest values are looked at as they are found
        _check_range(rows, kind, name)
    shape = (*rows_RC.shape[:-1], columns // block * size)
    if kind == GGMLQuantizationType.F32:
        return Encoding(rows.numpy().view(np.uint8).reshape(shape))
    out = np.empty((rows.shape[0], shape[-1]), dtype=np.uint8)
    if kind not in NATIVE:
        library, importance = how[0], _check_importance(how[1], columns, name)
        assert library is not None, f"{kind.name} needs ggml"
        pieces = _quantize(rows, out, kind, (library, importance), pool)
        return Encoding(out.reshape(shape), pieces, f"{name}: a block's scale overflows in {kind.name}")
    for start, end in _pieces(rows, NATIVE_PIECE):
        piece = torch.from_numpy(out[start:end])
        if kind in _SIXTEEN_BIT:
            piece.view(_SIXTEEN_BIT[kind]).copy_(rows[start:end])
        elif not _write_q8_0(rows[start:end], piece) < _LIMITS[kind]:  # true for NaN too
            _check_range(rows, kind, name)
    return Encoding(out.reshape(shape))


def _pieces(rows_RC: Tensor, values: int) -> list[tuple[int, int]]:
    rows, columns = rows_RC.shape
    step = max(1, values // columns)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _check_range(rows: Tensor, kind: GGMLQuantizationType, name: str) -> None:
    lowest, highest = (float(end) for end in torch.aminmax(rows))
    limit = _LIMITS.get(kind, math.inf)
    if lowest > -limit and highest < limit:  # false for NaN too
        return
    if math.isfinite(lowest) and math.isfinite(highest):
        what = f"{name}: values up to {max(-lowest, highest):g} are too large for {kind.name}"
        raise ExportError(what, "export as bf16 or f32")
    raise ExportError(f"{name}: holds values that are not finite", "check the base, or train again with a lower rate")


def _check_importance(importance_C: np.ndarray | None, columns: int, name: str) -> np.ndarray | None:
    """A column of importance 0 counts as the least important one: ggml writes zeros for a block without importance."""
    if importance_C is None:
        return None
    if importance_C.shape != (columns,) or not np.isfinite(importance_C).all() or (importance_C < 0).any():
        shape = importance_C.shape
        what = f"{name}: its importance has shape {shape} for {columns} columns, or values that mean nothing"
        raise ExportError(what, "compute the importance matrix of this very base again")
    seen = importance_C[importance_C > 0]
    if not seen.size:
        return None
    return np.ascontiguousarray(np.maximum(importance_C, seen.min()), dtype=np.float32)


def _write_q8_0(rows_RC: Tensor, out_RB: Tensor) -> float:
    """Blocks of 32: float16 scale (largest magnitude / 127), then 32 int8 (ggml-quants.c, quantize_row_q8_0_ref).
    Returns the largest magnitude of all, NaN where there is one.

    Codes are of the value times 1 / scale, in float32, before the scale itself is rounded. Where 1 / scale is infinite
    (a block of zeros, or all below 4e-37) the codes are zeros.
    """
    rows = rows_RC.shape[0]
    blocks = rows_RC.view(rows, -1, 32)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    scale = largest / 127
    inverse = 1 / scale
    codes = blocks * torch.where(torch.isfinite(inverse), inverse, 0.0)
    codes.add_(codes.sign(), alpha=BELOW_HALF)
    out = out_RB.view(torch.int8).view(rows, -1, 34)
    out[..., :2] = scale.to(torch.float16).view(torch.int8)
    out[..., 2:] = codes  # the conversion to int8 cuts off
    return float(largest.max()) if largest.numel() else 0.0


def _quantize(
    rows_RC: Tensor,
    out_RB: np.ndarray,
    kind: GGMLQuantizationType,
    how: tuple[Ggml, np.ndarray | None],
    pool: Executor,
) -> list[Future[bool]]:
    """Have `pool` fill `out_RB` piece by piece; false where a block cannot be written."""
    values, (library, importance_C) = rows_RC.numpy(), how

    def write(start: int, end: int) -> bool:
        return library.quantize(kind, values[start:end], out_RB[start:end], importance_C)

    return [pool.submit(write, *piece) for piece in _pieces(rows_RC, GGML_PIECE)]
