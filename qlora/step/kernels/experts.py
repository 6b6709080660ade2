"""The product of rows, sorted by expert, with experts in 4 bit: one launch, nothing read back, no weight in 16 bit; and
the sort itself.

As `operators.py`: on a GPU the kernel, on `meta` its result, on a CPU the twin in plain torch. Tiles are of fixed sizes
that follow from shapes alone: a layer that is computed once more in the backward pass must sum in the same order, or
another expert could be chosen than before.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.step.kernels import launching

_LIBRARY: Any = torch.library.Library("qlora", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "grouped_4bit(Tensor rows, Tensor codes, Tensor constants, Tensor table, Tensor ends, int out, int width, "
    "int block, bool high_first, bool back) -> Tensor"
)
_LIBRARY.define("unnest(Tensor absmax, Tensor nested, Tensor table, Tensor offset, int blocks) -> Tensor")
_LIBRARY.define("route(Tensor index, int experts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
NESTED = 256  # constants of NF4 that share one of their own (bitsandbytes' double quantization)
# Of a tile. With fewer rows an expert than FEW on average half of 64 would be empty: 16 are the least that tensor cores
# multiply (Triton's dot). With 64 x 128 x 32 two programs share an SM (111 to 118 registers a thread, 16 KiB; twice as
# deep one would fill it: 170 and more), for whose 99 KiB that is little (tests/step/kernels/compiled.py).
ROWS, FEW_ROWS, FEW = 64, 16, 16
COLUMNS, DEPTH = 128, 32
MOST_EXPERTS = 4096  # whose ends a program looks through; 512 are the most that a published family has (Qwen3-Next)
MOST_VALUES = 2**31  # of an expert: places in it are counted in 32 bits
UNNESTED = 1024  # constants a program
CHOICES, CHOICES_WARPS = 1024, 4  # that a program of `route` looks at at a time


class Packed(NamedTuple):
    """All experts of one projection as the kernel decodes them: value = table[code] * constant of its block.

    codes      (E, out * in / 2) uint8, two values a byte, in the order of the flattened expert (out, in)
    constants  (E, out * in / block) fp32; or uint8, which are powers of two: 2^(constant - 127), of MXFP4
    table      (16,) fp32, what a code means
    high_first the first value of a byte is in its upper four bits (NF4), or in its lower (MXFP4)
    """

    codes: Tensor
    constants: Tensor
    table: Tensor
    high_first: bool


def fits(shape: tuple[int, int, int], block: int) -> bool:
    """Whether the kernel can multiply with experts of a shape (E, out, in): blocks must end where rows do, and rows
    begin where 16 bytes can be read at once."""
    count, out, width = shape
    fitting = width % block == 0 and block % DEPTH == 0 and out % 16 == 0
    return fitting and count <= MOST_EXPERTS and out * width < MOST_VALUES


def grouped(rows: Tensor, packed: Packed, ends_E: Tensor, shape: tuple[int, int, int], back: bool) -> Tensor:
    """Rows (S, in) times the transposed weight of their expert; `back`: rows (S, out) times it. `shape`: out, in and
    values of a block."""
    codes, constants, table, high_first = packed
    operator = torch.ops.qlora.grouped_4bit
    return operator(rows.contiguous(), codes, constants, table, ends_E, *shape, high_first, back)  # type: ignore[no-any-return]


def unnest(absmax: Tensor, nested: Tensor, table: Tensor, offset: Tensor, blocks: int) -> Tensor:
    """Constants (E, blocks) in float32 of constants in 8 bit (E, whole nested blocks), each expert's own: nested
    (E, blocks / 256), table (256,), offset (E,)."""
    return torch.ops.qlora.unnest(absmax, nested, table, offset, blocks)  # type: ignore[no-any-return]


def route(index_TK: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a stable sort of the choices (T, K) of `count` experts gives: the expert of each sorted row (S,), where it
    comes from, where each row went, the token of each sorted row; and where the rows of each expert end (E,)."""
    return torch.ops.qlora.route(index_TK, count)  # type: ignore[no-any-return]


def tile_rows(rows: int, experts: int) -> int:
    return FEW_ROWS if rows < FEW * experts else ROWS


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def launch(rows: Tensor, tables: tuple[Tensor, ...], of_weight: tuple[int, ...], back: bool, into: Tensor) -> None:
    """`tables`: codes, constants, table and ends; `of_weight`: out, in, values of a block, whether the upper four bits
    are the first."""
    from qlora.step.kernels import experts_source

    (out, width, block, high_first), count = of_weight, len(tables[0])
    height = tile_rows(len(rows), count)
    across = -(-into.shape[1] // COLUMNS)
    shape = tile(height, count, block, bool(high_first), tables[1].dtype == torch.uint8)
    with launching._on(rows):
        grid = ((len(rows) // height + count) * across,)
        experts_source.grouped[grid](rows, *tables, into, count, out, width, BACK=back, **shape)


def tile(height: int, experts: int, block: int, high_first: bool, powers: bool) -> dict[str, Any]:
    """A program's constants, and how it is compiled."""
    kind = {"BLOCK": block, "HIGH_FIRST": high_first, "POWERS": powers, "EXPERTS": launching.row_block(max(2, experts))}
    sizes = {"ROWS": height, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    return {**kind, **sizes, "num_warps": 4 if height == FEW_ROWS else 8, "num_stages": 1}


def launch_unnest(absmax: Tensor, nested: Tensor, table: Tensor, offset: Tensor, into: Tensor) -> None:
    from qlora.step.kernels import experts_source

    count, blocks = into.shape
    with launching._on(absmax):
        grid, settings = (-(-blocks // UNNESTED), count), {"BLOCK": UNNESTED, "enable_fp_fusion": False}
        experts_source.unnest[grid](absmax, nested, table, offset, into, blocks, absmax.shape[1], **settings)


def _grouped_on_card(rows: Tensor, *rest: Any) -> Tensor:
    into = _grouped_on_meta(rows, *rest)
    if into.numel():
        launch(rows, rest[:4], rest[4:8], rest[8], into)
    return into


def _unnest_on_card(absmax: Tensor, nested: Tensor, table: Tensor, offset: Tensor, blocks: int) -> Tensor:
    into = _unnest_on_meta(absmax, nested, table, offset, blocks)
    launch_unnest(absmax, nested, table, offset, into)
    return into


def launch_route(index_TK: Tensor, into: tuple[Tensor, ...]) -> None:
    """`into`: expert, order, inverse, token, ends."""
    from qlora.step.kernels import experts_source

    rows, choices = index_TK.numel(), index_TK.shape[1]
    with launching._on(index_TK):
        settings = {"BLOCK": CHOICES, "num_warps": CHOICES_WARPS}
        experts_source.route[(len(into[4]),)](index_TK, *into, rows, choices, **settings)


def _route_on_card(index_TK: Tensor, count: int) -> tuple[Tensor, ...]:
    into = _route_on_meta(index_TK, count)
    launch_route(index_TK.contiguous(), into)
    return into


# --- on meta ----------------------------------------------------------------------------------------------------------


def _grouped_on_meta(rows: Tensor, *rest: Any) -> Tensor:
    out, width, _, _, back = rest[4:]
    return rows.new_empty(rows.shape[0], width if back else out)


def _unnest_on_meta(absmax: Tensor, nested: Tensor, table: Tensor, offset: Tensor, blocks: int) -> Tensor:
    return nested.new_empty(absmax.shape[0], blocks)


def _route_on_meta(index_TK: Tensor, count: int) -> tuple[Tensor, ...]:
    places = [index_TK.new_empty(index_TK.numel(), dtype=torch.int64) for _ in range(4)]
    return (*places, index_TK.new_empty(count, dtype=torch.int32))


# --- in plain torch ---------------------------------------------------------------------------------------------------


def _grouped_plainly(rows: Tensor, *rest: Any) -> Tensor:
    """Expert by expert, in float32, rounded once."""
    codes, constants, table, ends_E, out, width, block, high_first, back = rest
    into = _grouped_on_meta(rows, *rest)
    for expert, (start, end) in enumerate(pairwise([0, *ends_E.tolist()])):
        if start < end:
            weight = _decoded(codes[expert], constants[expert], table, block, high_first).view(out, width)
            weight = weight.to(rows.dtype).float()
            into[start:end] = (rows[start:end].float() @ (weight if back else weight.t())).to(rows.dtype)
    return into


def _decoded(codes: Tensor, constants: Tensor, table: Tensor, block: int, high_first: bool) -> Tensor:
    """Values of an expert, flat, in float32."""
    if constants.dtype == torch.uint8:
        constants = torch.ldexp(torch.ones_like(constants, dtype=torch.float32), constants.int() - 127)
    halves = (codes >> 4, codes & 15)
    both = table[torch.stack(halves if high_first else halves[::-1], dim=1).view(-1, block).int()]
    return both * constants[:, None]


def _unnest_plainly(absmax: Tensor, nested: Tensor, table: Tensor, offset: Tensor, blocks: int) -> Tensor:
    wide = table[absmax.int()] * nested.repeat_interleave(NESTED, dim=1)
    return (wide + offset[:, None])[:, :blocks].contiguous()


def _route_plainly(index_TK: Tensor, count: int) -> tuple[Tensor, ...]:
    expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(count), right=True).int()
    return expert_S.long(), order_S, torch.argsort(order_S), order_S // index_TK.shape[1], ends_E


def _register(name: str, on_card: Any, on_meta: Any, plainly: Any) -> None:
    for key, function in (("CUDA", on_card), ("Meta", on_meta), ("CPU", plainly)):
        _LIBRARY.impl(name, function, key)


_register("grouped_4bit", _grouped_on_card, _grouped_on_meta, _grouped_plainly)
_register("unnest", _unnest_on_card, _unnest_on_meta, _unnest_plainly)
_register("route", _route_on_card, _route_on_meta, _route_plainly)
