"""The kernels' source. Imported where they are launched or compiled alone: Triton is there on Linux, with torch.

Numbers are read in their own type, computed in float32 and rounded once, as they are written.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return, name-defined"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(e_ptr, g_ptr, h_ptr, count, BLOCK: tl.constexpr):
    """h = silu(e) * g."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    e = tl.load(e_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    h = e / (1.0 + tl.exp(-e)) * g
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(grad_ptr, e_ptr, g_ptr, count, BLOCK: tl.constexpr):
    """Over the gradient of h goes h, over e and g go their gradients."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(e_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-e))
    activated = e * s
    grad_e = grad * g * s * (1.0 + e * (1.0 - s))
    tl.store(grad_ptr + at, (activated * g).to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(e_ptr + at, grad_e.to(e_ptr.dtype.element_ty), mask=inside)
    tl.store(g_ptr + at, (grad * activated).to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm(x_ptr, weight_ptr, y_ptr, inverse_ptr, width, eps, FROM_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program. FROM_ONE: y = x/rms * (1 + weight), rounded once; else x/rms is rounded before weight."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = x * inverse
    if FROM_ONE:  # noqa: SIM108 - the compiler has no such expression for what differs in type
        y = normed * (1.0 + weight)
    else:
        y = normed.to(y_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(y_ptr + row * width + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + row, inverse)


@triton.jit
def rms_norm_backward(
    grad_ptr, x_ptr, weight_ptr, inverse_ptr, into_ptr, width, FROM_ONE: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of x, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    grad = tl.load(grad_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + row)
    weighted = grad * (1.0 + weight) if FROM_ONE else grad * weight
    normed = x * inverse
    common = tl.sum(weighted * normed, axis=0) / width
    into = (weighted - normed * common) * inverse
    tl.store(into_ptr + row * width + at, into.to(into_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(
    codes_ptr,
    values_ptr,
    absmax_ptr,
    constants_ptr,
    nested_ptr,
    offset_ptr,
    weight_ptr,
    count,
    BLOCK: tl.constexpr,
):
    """A byte holds two values, the upper four bits the first; 64 values have one constant of 8 bits, and 256 constants
    one of 32. To the bit what bitsandbytes computes in three kernels: no product is fused with a sum."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    packed = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
    block = at // 32
    index = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
    nested = tl.load(nested_ptr + block // 256, mask=inside, other=0.0)
    constant = tl.load(constants_ptr + index, mask=inside, other=0.0) * nested + tl.load(offset_ptr)
    first = tl.load(values_ptr + (packed >> 4), mask=inside, other=0.0) * constant
    second = tl.load(values_ptr + (packed & 15), mask=inside, other=0.0) * constant
    both = tl.interleave(first, second)
    into = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(weight_ptr + into, both.to(weight_ptr.dtype.element_ty), mask=into < 2 * count)


@triton.jit
def gated_adapted(
    e_ptr, g_ptr, low_e_ptr, low_g_ptr, up_e_ptr, up_g_ptr, h_ptr,
    rows, width, low_e_row, low_g_row, rank_e, rank_g, scale_e, scale_g,
    KEEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h = silu(e) * g, where e and g (rows, width) still lack scale * low B' of their adapters; low (rows, rank) and
    B (width, rank). KEEPS: the sums go into the places of e and g, rounded as they are read again."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < width
    at = row[:, None] * width + column[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    e = adapted(e_ptr, low_e_ptr, up_e_ptr, row, column, rows, width, low_e_row, rank_e, scale_e, ROWS, COLUMNS)
    g = adapted(g_ptr, low_g_ptr, up_g_ptr, row, column, rows, width, low_g_row, rank_g, scale_g, ROWS, COLUMNS)
    if KEEPS:
        tl.store(e_ptr + at, e, mask=inside)
        tl.store(g_ptr + at, g, mask=inside)
    wide = e.to(tl.float32)
    h = wide / (1.0 + tl.exp(-wide)) * g.to(tl.float32)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adapted(
    y_ptr, low_ptr, up_ptr, row, column, rows, width, low_row, rank, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A tile of y + scale * low B', as outer products: a rank is too small for tensor cores to gain by."""
    row_inside, column_inside = row < rows, column < width
    share = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(rank):
        low = tl.load(low_ptr + row * low_row + at, mask=row_inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + column * rank + at, mask=column_inside, other=0.0).to(tl.float32)
        share += low[:, None] * up[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    y = tl.load(y_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return (y + share * scale).to(y_ptr.dtype.element_ty)


@triton.jit
def rope_qk(
    q_ptr, k_ptr, cos_ptr, sin_ptr, into_q_ptr, into_k_ptr, length, q_heads, k_heads,
    q_row, q_head, q_token, k_row, k_head, k_token, table_row, width, turned,
    BACK: tl.constexpr, FORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The heads of a token a program, from (B, heads, S, width) of any strides into (B, S, heads, width).

    FORM 0: columns i and i + turned/2 are a pair; 1: columns 2i and 2i + 1; 2: as 1, whose angle is that of column i.
    BACK: turned back, as gradients are. Columns behind `turned` are copied (REST of them, or 0).
    """
    token = tl.program_id(0).to(tl.int64)
    row, place = token // length, token % length
    at = tl.arange(0, HALF)
    inside = at < turned // 2
    first = at if FORM == 0 else 2 * at
    second = at + turned // 2 if FORM == 0 else 2 * at + 1
    table = row * table_row + place * turned
    first_angle = table + (at if FORM == 2 else first)
    second_angle = table + (at if FORM == 2 else second)
    first_cos = tl.load(cos_ptr + first_angle, mask=inside, other=0.0).to(tl.float32)
    second_cos = tl.load(cos_ptr + second_angle, mask=inside, other=0.0).to(tl.float32)
    first_sin = tl.load(sin_ptr + first_angle, mask=inside, other=0.0).to(tl.float32)
    second_sin = tl.load(sin_ptr + second_angle, mask=inside, other=0.0).to(tl.float32)
    onto_first = second_sin if BACK else -first_sin
    onto_second = -first_sin if BACK else second_sin
    q_from, k_from = q_ptr + row * q_row + place * q_token, k_ptr + row * k_row + place * k_token
    q_to, k_to = into_q_ptr + token * q_heads * width, into_k_ptr + token * k_heads * width
    for start in range(0, q_heads, HEADS):
        turn(
            q_from, q_to, start, q_heads, q_head, width, turned, first, second, inside,
            first_cos, second_cos, onto_first, onto_second, HEADS, REST,
        )  # fmt: skip
    for start in range(0, k_heads, HEADS):
        turn(
            k_from, k_to, start, k_heads, k_head, width, turned, first, second, inside,
            first_cos, second_cos, onto_first, onto_second, HEADS, REST,
        )  # fmt: skip


@triton.jit
def turn(
    x_ptr, into_ptr, start, heads, head_stride, width, turned, first, second, inside,
    first_cos, second_cos, onto_first, onto_second, HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads from the `start`-th on, each pair (x, y) of columns by its angle."""
    head = start + tl.arange(0, HEADS)
    there = (head < heads)[:, None] & inside[None, :]
    source, into = x_ptr + head[:, None] * head_stride, into_ptr + head[:, None] * width
    x = tl.load(source + first[None, :], mask=there, other=0.0).to(tl.float32)
    y = tl.load(source + second[None, :], mask=there, other=0.0).to(tl.float32)
    kind = into_ptr.dtype.element_ty
    tl.store(into + first[None, :], (x * first_cos[None, :] + y * onto_first[None, :]).to(kind), mask=there)
    tl.store(into + second[None, :], (y * second_cos[None, :] + x * onto_second[None, :]).to(kind), mask=there)
    if REST > 0:
        rest = turned + tl.arange(0, REST)
        beside = (head < heads)[:, None] & (rest < width)[None, :]
        tl.store(into + rest[None, :], tl.load(source + rest[None, :], mask=beside), mask=beside)


@triton.jit
def cross_entropy(
    logits_ptr, targets_ptr, weights_ptr, logprobs_ptr, width, factor, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Over a row of logits goes the gradient of -weight * log-probability of its target, which is put out.

    z = factor * logit, and with CAPPED cap * tanh(z / cap). Two ways through the row: its largest z and the sum of
    exp(z - largest), kept for each place of a block and joined behind the last one; then the gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    target, weight = tl.load(targets_ptr + row), tl.load(weights_ptr + row)
    # Before the sums, at which all threads meet: behind them one may be overwriting it already.
    of_target = scaled(tl.load(logits_ptr + target).to(tl.float32), factor, cap, CAPPED)
    at = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -3.0e38, dtype=tl.float32)  # finite: from infinity nothing can be taken away
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        z = scaled(tl.load(logits_ptr + start + at, mask=inside, other=0.0).to(tl.float32), factor, cap, CAPPED)
        higher = tl.where(inside, tl.maximum(largest, z), largest)
        total = total * tl.exp(largest - higher) + tl.where(inside, tl.exp(z - higher), 0.0)
        largest = higher
    top = tl.max(largest, axis=0)
    log_total = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    tl.store(logprobs_ptr + row, of_target - log_total)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        z = scaled(tl.load(logits_ptr + start + at, mask=inside, other=0.0).to(tl.float32), factor, cap, CAPPED)
        gradient = (tl.exp(z - log_total) - tl.where(start + at == target, 1.0, 0.0)) * weight * factor
        if CAPPED:
            gradient *= 1.0 - (z / cap) * (z / cap)
        tl.store(logits_ptr + start + at, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scaled(logits, factor, cap, CAPPED: tl.constexpr):
    """factor * logit; CAPPED: cap * tanh of it over cap, by exponentials that cannot overflow."""
    z = logits * factor
    if CAPPED:
        shrunk = tl.exp(-2.0 * tl.abs(z) / cap)
        size = cap * (1.0 - shrunk) / (1.0 + shrunk)
        z = tl.where(z < 0, -size, size)
    return z
