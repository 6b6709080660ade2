"""How the kernels are launched: sizes of blocks, threads, and what is handed over.

Elementwise kernels take BLOCK values a program; norms a row, with as many warps as keep 16 values a thread.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qlora import device

BLOCK = 1024
DEQUANTIZED_BYTES = 512  # of codes a program: 1,024 values
LARGEST_ROW = 16384  # values of a norm's row, which one program holds in registers
TILE = (16, 128)  # rows and columns of what takes an adapter's share: 8 values a thread of TILE_WARPS, of e and of g
TILE_WARPS = 8
PAIRS = 1024  # that are turned at a time, of several heads
# Of a row of logits at a time, 8 values a thread; the second time a row (512 KiB of 262,144) is read from the L2 cache.
LOGITS, LOGITS_WARPS = 2048, 8


def gated(e: Tensor, g: Tensor, h: Tensor) -> None:
    from qlora.step.kernels import source

    count = e.numel()
    with _on(e):
        source.gated[(_cover(count, BLOCK),)](e, g, h, count, BLOCK=BLOCK)


def gated_backward(grad_h: Tensor, e: Tensor, g: Tensor) -> None:
    from qlora.step.kernels import source

    count = e.numel()
    with _on(e):
        source.gated_backward[(_cover(count, BLOCK),)](grad_h, e, g, count, BLOCK=BLOCK)


def rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool, into: tuple[Tensor, Tensor]) -> None:
    """`into`: y, and 1/rms of each row in float32."""
    from qlora.step.kernels import source

    rows, width = x.shape
    shape = {"FROM_ONE": from_one, "BLOCK": row_block(width), "num_warps": warps(width)}
    with _on(x):
        source.rms_norm[(rows,)](x, weight, *into, width, eps, **shape)


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, from_one: bool, into: Tensor) -> None:
    from qlora.step.kernels import source

    rows, width = x.shape
    shape = {"FROM_ONE": from_one, "BLOCK": row_block(width), "num_warps": warps(width)}
    with _on(x):
        source.rms_norm_backward[(rows,)](grad_y, x, weight, inverse, into, width, **shape)


def dequantize(codes: Tensor, tables: tuple[Tensor, ...], weight: Tensor) -> None:
    """`tables`: the 16 values, constants in 8 bit, their 256 values, nested constants, offset."""
    from qlora.step.kernels import source

    values, absmax, constants, nested, offset = tables
    count, settings = weight.numel() // 2, {"BLOCK": DEQUANTIZED_BYTES, "enable_fp_fusion": False}
    with _on(codes):
        grid = (_cover(count, DEQUANTIZED_BYTES),)
        source.dequantize[grid](codes, values, absmax, constants, nested, offset, weight, count, **settings)


def gated_adapted(
    pair: tuple[Tensor, Tensor], adapters: tuple[Tensor, ...], scales: Any, keeps: bool, h: Tensor
) -> None:
    """`pair`: e and g; `adapters`: x A' of both, then B of both."""
    from qlora.step.kernels import source

    (rows, width), (low_e, low_g, up_e, up_g) = h.shape, adapters
    sizes = (rows, width, low_e.stride(0), low_g.stride(0), up_e.shape[1], up_g.shape[1], *scales)
    shape = {"KEEPS": keeps, "ROWS": TILE[0], "COLUMNS": TILE[1], "num_warps": TILE_WARPS}
    with _on(h):
        grid = (_cover(rows, TILE[0]), _cover(width, TILE[1]))
        source.gated_adapted[grid](*pair, low_e, low_g, up_e, up_g, h, *sizes, **shape)


def rope_qk(pair: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], form: int, back: bool, into: Any) -> None:
    """`pair`: q and k (B, heads, S, D), values of a head side by side; `tables`: cosines and sines (B or 1, S, R)."""
    from qlora.step.kernels import source

    (q, k), (cos, sin) = pair, tables
    (rows, q_heads, length, width), turned = q.shape, cos.shape[-1]
    table_row = length * turned if cos.shape[0] > 1 else 0
    sizes = (length, q_heads, k.shape[1], *q.stride()[:3], *k.stride()[:3], table_row, width, turned)
    with _on(q):
        source.rope_qk[(rows * length,)](q, k, cos, sin, *into, *sizes, **turning(width, turned, form, back))


def turning(width: int, turned: int, form: int, back: bool) -> dict[str, Any]:
    """A program's constants, for heads of so many columns of which so many are turned."""
    half, rest = row_block(turned // 2), width - turned
    heads = max(1, PAIRS // half)
    return {"BACK": back, "FORM": form, "HEADS": heads, "HALF": half, "REST": row_block(rest) if rest else 0}


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, scaling: tuple[float, float], into: Tensor) -> None:
    """`scaling`: what logits are multiplied by, and their cap (0: none); `into`: log-probabilities in float32."""
    from qlora.step.kernels import source

    rows, width = logits.shape
    shape = {"CAPPED": scaling[1] > 0, "BLOCK": min(LOGITS, row_block(width)), "num_warps": LOGITS_WARPS}
    with _on(logits):
        source.cross_entropy[(rows,)](logits, targets, weights, into, width, *scaling, **shape)


def row_block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def warps(width: int) -> int:
    return min(16, max(1, row_block(width) // 512))


def _cover(count: int, block: int) -> int:
    return -(-count // block)


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return device.accelerator.device_of(tensor)
