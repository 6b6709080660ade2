"""16-bit products on processors that have none: computed in fp32, rounded once.

Without AVX512-BF16 or AMX (most laptops, most desktops before 2022) torch multiplies bf16 matrices one number at a
time: 1.2 GFLOP/s on a core that does 90 in fp32 (400 × 768 by 768 × 256, torch 2.13, AVX2), so that the quickstart
takes 45 minutes instead of one or two. bf16 numbers are exact in fp32, and a bf16 product is summed in fp32 anyway:
what changes is the order of the sums, as it does from one processor to the next. The same holds of fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora import numerics
from qlora.device import full_sums
from qlora.model.nf4 import product_4bit

_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_PRODUCTS = {
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default),
    *(_ATEN.linear.default, _ATEN.matmul.default),
    *(_ATTENTION, _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default),
}

_ANSWERS: dict[str, bool] = {}


@contextmanager
def fast_matmul(device: torch.device) -> Iterator[None]:
    """Inside the block, 16-bit products on the CPU run in fp32 where that is faster; a GPU adds up in fp32 throughout.

    That is in bf16, and in fp16 where the run under way computes in it.
    """
    with full_sums(device):
        run = numerics.of_run()
        fast = has_fp16_products() if run is not None and run.dtype == "fp16" else has_bf16_products()
        if device.type != "cpu" or fast:
            yield
            return
        with _InFp32():  # type: ignore[no-untyped-call]
            yield


def has_bf16_products() -> bool:
    """Whether torch has fast bf16 kernels for this processor (by oneDNN's own check: AVX512 on x86, bf16 on arm64)."""
    return _answer("bf16", torch.ops.mkldnn._is_mkldnn_bf16_supported)


def has_fp16_products() -> bool:
    """The same of fp16 (AVX512-FP16 or AMX-FP16 on x86, fp16 on arm64)."""
    return _answer("fp16", torch.ops.mkldnn._is_mkldnn_fp16_supported)


def _answer(name: str, ask: Callable[[], Any]) -> bool:
    """Asked once: torch's compiler follows a look into a dict, and no question to oneDNN."""
    if name not in _ANSWERS:
        _ANSWERS[name] = bool(ask())
    return _ANSWERS[name]


def product_dtype(inputs: Tensor) -> torch.dtype:
    """The type that products of `inputs` are computed in: theirs, or fp32 where that is faster."""
    return torch.float32 if _is_slow(inputs) else inputs.dtype


class _InFp32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Widens the 16-bit inputs of products and narrows what comes out of them."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func.name() == "bitsandbytes::gemm_4bit" and _is_slow(args[0]):
            return product_4bit(*args, **named, dtype=torch.float32)  # bitsandbytes' own product no mode sees
        narrow = next((value.dtype for value in args if _is_slow(value)), None) if func in _PRODUCTS else None
        if narrow is None:
            return func(*args, **named)
        result = func(*map(_wide, args), **{name: _wide(value) for name, value in named.items()})
        if isinstance(result, Tensor):
            return result.to(narrow)
        # Attention: the output and gradients as they came in; its log-sum-exp is fp32 in any case.
        return tuple(
            value.to(narrow) if isinstance(value, Tensor) and (func, place) != (_ATTENTION, 1) else value
            for place, value in enumerate(result)
        )


def _is_slow(value: Any) -> bool:
    """Whether it is of a type that this processor multiplies number by number."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    if value.dtype == torch.bfloat16:
        return not has_bf16_products()
    return value.dtype == torch.float16 and not has_fp16_products()


def _wide(value: Any) -> Any:
    return value.float() if _is_slow(value) else value
