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


def row_block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def warps(width: int) -> int:
    return min(16, max(1, row_block(width) // 512))


def _cover(count: int, block: int) -> int:
    return -(-count // block)


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return device.accelerator.device_of(tensor)
