"""What other stacks do, switch by switch, so that published peaks of theirs can be predicted by our own simulation.

Each switch is one thing in which programs differ; `STACKS` says how the programs of the published runs set them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from qlora.memory.baselines import Baseline


@dataclass(frozen=True)
class Stack(Baseline):
    """A baseline whose attention is of a kernel that the program chose.

    `kernel` is "flash", "efficient" (of torch's sdpa, keys repeated for each query head), or None for what our own
    attention chooses. `half`: computes in float16, and a base that is not quantized is held in it.
    `norms` is what they are computed in, "float32" as transformers does or "16 bit".
    """

    kernel: str | None = None
    half: bool = False
    norms: str = "float32"

    def settle(self, model: Any, quantized: bool) -> list[int]:
        before = super().settle(model, quantized)
        if self.half and not quantized:
            model.half()
        for module in model.modules() if self.norms == "16 bit" else ():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(_norm_in_16_bit, module)
        if self.kernel is not None:
            model.set_attn_implementation("sdpa")
        return before

    @contextmanager
    def computing(self) -> Iterator[None]:
        with ExitStack() as modes:
            modes.enter_context(super().computing())
            if self.kernel is not None:
                modes.enter_context(_Kernel(self.kernel))
            if self.half:
                modes.enter_context(_HalfSoftmax())
            yield


def _norm_in_16_bit(norm: Any, hidden_BSD: Tensor) -> Tensor:
    """lit_gpt/rmsnorm.py of October 2023, RMSNorm.forward: no step of it leaves the type of its input."""
    mean_BS1 = torch.mean(hidden_BSD * hidden_BSD, dim=-1, keepdim=True)
    normed_BSD = hidden_BSD * torch.rsqrt(mean_BS1 + norm.variance_epsilon)
    return norm.weight * normed_BSD  # type: ignore[no-any-return]


class _Kernel(TorchFunctionMode):
    """Causal attention without a mask, by the kernel of that name."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        scale = (kwargs or {}).get("scale")
        if self.kernel == "flash":
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, True, False, scale=scale)[0]
        needs_gradient = torch.is_grad_enabled() and query.requires_grad
        key, value = _for_each_head(key, query), _for_each_head(value, query)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, None, needs_gradient, 0.0, True, scale=scale)[0]


class _HalfSoftmax(TorchFunctionMode):
    """CUDA's softmax takes float16 in and gives float32 out at once (aten/src/ATen/native/SoftMax.cpp)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.softmax and args[0].dtype == torch.float16 and kwargs.get("dtype"):
            return torch._softmax(args[0], kwargs.get("dim", -1), True)
        return func(*args, **kwargs)


def _for_each_head(shared: Tensor, query: Tensor) -> Tensor:
    groups = query.shape[1] // shared.shape[1]
    return shared.repeat_interleave(groups, dim=1) if groups > 1 else shared
