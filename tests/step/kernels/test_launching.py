"""Sizes of a launch."""

from __future__ import annotations

from qlora.step.kernels.launching import LARGEST_ROW, row_block, warps


def test_a_row_has_a_block_that_holds_it_and_warps_that_hold_the_block() -> None:
    for width in (1, 2, 63, 64, 65, 4096, 5376, 8192, LARGEST_ROW):
        block = row_block(width)
        assert width <= block < 2 * width or block == width == 1
        assert warps(width) in (1, 2, 4, 8, 16) and block <= 32 * warps(width) * 32
