"""The kernels' source. Imported where they are launched or compiled alone: Triton is there on Linux, with torch.

Numbers are read in their own type, computed in float32 and rounded once, as they are written.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-any-return, name-defined"
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
