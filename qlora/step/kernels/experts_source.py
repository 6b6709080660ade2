"""The source of the product of rows with experts in 4 bit. As `source.py`, imported where it is launched alone.

A tile is rows of one expert times columns: tiles never cross experts, and an expert that begins at row b has its first
tile at b // ROWS + its number, so that all of them have their places among rows // ROWS + experts whatever the routing
is, and a program finds its own from where experts end. Weights are decoded into registers: code to value, times the
constant of its block, in float32, rounded to the type of the rows, as a weight that is dequantized whole.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return, name-defined"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped(
    rows_ptr, codes_ptr, constants_ptr, table_ptr, ends_ptr, into_ptr, experts, out, width,
    BACK: tl.constexpr, BLOCK: tl.constexpr, HIGH_FIRST: tl.constexpr, POWERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Rows (S, width) times W', (S, out), of experts W (out, width); BACK: rows (S, out) times W, (S, width).

    EXPERTS: a power of two that is no less than `experts`. POWERS: constants are exponents of two.
    """
    columns = width if BACK else out
    across = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0) // across
    start = tl.program_id(0) % across * COLUMNS
    number = tl.arange(0, EXPERTS)
    begins = tl.load(ends_ptr + number - 1, mask=(number > 0) & (number < experts), other=0)
    expert = tl.sum(((number < experts) & (begins // ROWS + number <= tile)).to(tl.int32), axis=0) - 1
    begin = tl.sum(tl.where(number == expert, begins, 0), axis=0)
    first, end = begin + (tile - begin // ROWS - expert) * ROWS, tl.load(ends_ptr + expert)
    if first < end:
        codes_ptr += expert.to(tl.int64) * out * (width // 2)
        constants_ptr += expert.to(tl.int64) * out * (width // BLOCK)
        row = first + tl.arange(0, ROWS)
        total = tile_of(
            rows_ptr, codes_ptr, constants_ptr, table_ptr, row, end, start, out, width,
            BACK, BLOCK, HIGH_FIRST, POWERS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        column = start + tl.arange(0, COLUMNS)
        into = into_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < end)[:, None] & (column < columns)[None, :]
        tl.store(into, total.to(into_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_of(
    rows_ptr, codes_ptr, constants_ptr, table_ptr, row, end, start, out, width,
    BACK: tl.constexpr, BLOCK: tl.constexpr, HIGH_FIRST: tl.constexpr, POWERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The sums (ROWS, COLUMNS) of a tile, in float32.

    What the next step of the loop needs is asked for before this one computes. Triton's own pipeline would copy every
    value that is looked up in the table to shared memory, four bytes at a time.
    """
    depth = out if BACK else width
    column = start + tl.arange(0, COLUMNS)
    left = rows_of(rows_ptr, row, end, 0, depth, DEPTH)
    packed, constant = codes_of(codes_ptr, constants_ptr, column, 0, start, out, width, BACK, BLOCK, POWERS, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, depth, DEPTH):
        then = at + DEPTH
        next_left = rows_of(rows_ptr, row, end, then, depth, DEPTH)
        next_packed, next_constant = codes_of(
            codes_ptr, constants_ptr, column, then, start, out, width, BACK, BLOCK, POWERS, DEPTH
        )
        right = decoded(packed, constant, table_ptr, HIGH_FIRST).to(left.dtype)
        total = tl.dot(left, right if BACK else tl.trans(right), total, input_precision="ieee")
        left, packed, constant = next_left, next_packed, next_constant
    return total


@triton.jit
def rows_of(rows_ptr, row, end, at, depth, DEPTH: tl.constexpr):
    """Columns of rows (their number, DEPTH) from `at` on; zeros outside."""
    inner = at + tl.arange(0, DEPTH)
    inside = (row < end)[:, None] & (inner < depth)[None, :]
    return tl.load(rows_ptr + row.to(tl.int64)[:, None] * depth + inner[None, :], mask=inside, other=0.0)


@triton.jit
def codes_of(
    codes_ptr, constants_ptr, column, at, start, out, width,
    BACK: tl.constexpr, BLOCK: tl.constexpr, POWERS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Bytes of a piece of an expert, and their constants: of DEPTH rows from `at` on the columns from `start` on with
    BACK, else of the rows `column` DEPTH columns from `at` on. BLOCK is a multiple of DEPTH."""
    half = width // 2
    if BACK:
        row = at + tl.arange(0, DEPTH)
        pair = start // 2 + tl.arange(0, column.shape[0] // 2)
        there = (row < out)[:, None] & (pair < half)[None, :]
        constant = constants(constants_ptr, row, start // BLOCK, row < out, width // BLOCK, POWERS)[:, None]
        for number in tl.static_range(1, column.shape[0] // BLOCK):
            beside = constants(constants_ptr, row, start // BLOCK + number, row < out, width // BLOCK, POWERS)
            constant = tl.where((pair < start // 2 + number * BLOCK // 2)[None, :], constant, beside[:, None])
    else:
        at = tl.minimum(at, width - DEPTH)  # rows are whole blocks; behind the last one it is read once more
        row, pair = column, at // 2 + tl.arange(0, DEPTH // 2)
        there = (row < out)[:, None]
        constant = constants(constants_ptr, row, at // BLOCK, row < out, width // BLOCK, POWERS)[:, None]
    place = tl.multiple_of(row * half, 16)[:, None] + pair[None, :]
    return tl.load(codes_ptr + place, mask=there, other=0), constant


@triton.jit
def decoded(packed, constant, table_ptr, HIGH_FIRST: tl.constexpr):
    """The values of bytes, twice as many columns, in float32."""
    high, low = (packed >> 4).to(tl.int32), (packed & 15).to(tl.int32)
    first = high if HIGH_FIRST else low
    second = low if HIGH_FIRST else high
    return tl.interleave(tl.load(table_ptr + first) * constant, tl.load(table_ptr + second) * constant)


@triton.jit
def constants(constants_ptr, row, block, row_inside, blocks, POWERS: tl.constexpr):
    """The constant of a block of each row, in float32; of a row outside zero, or with POWERS the least there is; of a
    block behind the last one the last one's, for columns of which nothing is kept."""
    constant = tl.load(constants_ptr + row * blocks + tl.minimum(block, blocks - 1), mask=row_inside, other=0)
    if POWERS:  # 2^(constant - 127), whose bits are the constant before 23 zeros; of 0 it is no normal number
        power = constant.to(tl.int32)
        constant = tl.where(power == 0, 1 << 22, power << 23).to(tl.float32, bitcast=True)
    return constant


@triton.jit
def unnest(absmax_ptr, nested_ptr, table_ptr, offset_ptr, into_ptr, blocks, padded, BLOCK: tl.constexpr):
    """The constants (experts, blocks) of NF4 in float32 from their own 8 bits (experts, padded): 256 of them share a
    constant, and what was taken off all constants of an expert is added. To the bit bitsandbytes' own, in which no
    product is fused with a sum."""
    expert, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < blocks
    index = tl.load(absmax_ptr + expert * padded + at, mask=inside, other=0).to(tl.int32)
    nested = tl.load(nested_ptr + expert * (padded // 256) + at // 256, mask=inside, other=0.0)
    constant = tl.load(table_ptr + index, mask=inside, other=0.0) * nested + tl.load(offset_ptr + expert)
    tl.store(into_ptr + expert * blocks + at, constant, mask=inside)


@triton.jit
def route(
    index_ptr, expert_ptr, order_ptr, inverse_ptr, token_ptr, ends_ptr, rows, choices, BLOCK: tl.constexpr
):  # fmt: skip
    """An expert a program: the rows that chose it, in their order, behind those of the experts before it.

    Every program goes through all choices twice, from the L2 cache (128 KiB of 16,384 rows): once to count, so that it
    knows where its rows begin, and once to put down the number of each.
    """
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    own = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, rows, BLOCK):
        chosen = tl.load(index_ptr + start + at, mask=start + at < rows, other=-1)
        before += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    place = tl.sum(before, axis=0)
    tl.store(ends_ptr + expert, place + tl.sum(own, axis=0))
    for start in range(0, rows, BLOCK):
        row = start + at
        here = tl.load(index_ptr + row, mask=row < rows, other=-1) == expert
        to = place + tl.cumsum(here.to(tl.int32), axis=0) - 1
        tl.store(order_ptr + to, row.to(tl.int64), mask=here)
        tl.store(token_ptr + to, (row // choices).to(tl.int64), mask=here)
        tl.store(expert_ptr + to, expert.to(tl.int64), mask=here)
        tl.store(inverse_ptr + row, to.to(tl.int64), mask=here)
        place += tl.sum(here.to(tl.int32), axis=0)
