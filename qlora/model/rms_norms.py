"""Norms that are RMSNorm in either of its two forms, as one function: known by what they give, not by name.

Where there are kernels it is one of them; elsewhere torch computes it, with fewer passes than autograd's own, and half
of what that keeps (x as it came, and not in float32).

A module with one vector of weights and an epsilon is tried on numbers of its own: a copy of it, with weights that are
drawn, is called on the CPU. What gives the very bits of a form (`step/kernels/operators.py`) is that form.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.errors import foreign_failures
from qlora.model.reclassed import called_as
from qlora.step.kernels import operators
from qlora.step.kernels.launching import LARGEST_ROW

_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # as modules call it
_KINDS = (torch.float32, torch.bfloat16)
_WIDTH = 24  # of the trial


def put_in(model: nn.Module, by_kernel: bool) -> int:
    """Has the norms of `model` computed by the function where nobody trains them; how many there are."""
    count = 0
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 1 or weight.requires_grad or weight.numel() > LARGEST_ROW:
            continue
        form = form_of(module)
        if form is not None:
            eps, from_one = form
            kind: Any = type(module)
            module.__class__ = _normed(kind, eps, from_one, by_kernel)
            count += 1
    return count


def form_of(module: nn.Module) -> tuple[float, bool] | None:
    """Epsilon of an RMSNorm, and whether its factor is 1 + weight; None for any other module."""
    eps = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None or len(list(module.parameters())) != 1 or any(True for _ in module.children()) or module._buffers:
        return None
    generator = torch.Generator().manual_seed(0)
    twin = copy.copy(module)
    found: list[bool] = []
    with foreign_failures(trial=True) as failure, torch.no_grad():
        for from_one in (False, True):
            equal = []
            for kind in _KINDS:
                weight, x = (torch.randn(shape, generator=generator).to(kind) for shape in ((_WIDTH,), (5, _WIDTH)))
                twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
                right = operators.rms_norm(x, weight, eps, from_one)[0]
                equal.append(torch.equal(type(module).forward(twin, x), right))
            found += [from_one] if all(equal) else []
    return (eps, found[0]) if found and not failure.error else None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight: Tensor, eps: float, from_one: bool, by_kernel: bool) -> Tensor:
        forth = operators.rms_norm if by_kernel else operators.rms_norm_plainly
        y_ND, inverse_N = forth(x_ND, weight, eps, from_one)
        ctx.save_for_backward(x_ND, weight, inverse_N)
        ctx.from_one, ctx.by_kernel = from_one, by_kernel
        return y_ND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x_ND, weight, inverse_N = ctx.saved_tensors
        back = operators.rms_norm_backward if ctx.by_kernel else operators.rms_norm_backward_plainly
        into_ND = back(gradient.contiguous(), x_ND, weight, inverse_N, ctx.from_one)
        return into_ND, None, None, None, None


@lru_cache(64)
def _normed(kind: Any, eps: float, from_one: bool, by_kernel: bool) -> Any:
    """A norm whose forward pass is the function's, for tensors whose type is that of its weight."""

    class OneNorm(kind):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
            if args or named or x.dtype != self.weight.dtype:  # Mamba's norms take a gate beside x
                return super().forward(x, *args, **named)  # type: ignore[no-any-return]
            # A kernel reads row behind row: of a slice (latent attention's, a gated query's) a copy.
            x_ND = x.reshape(-1, x.shape[-1]).contiguous()
            normed_ND = _RmsNorm.apply(x_ND, self.weight, eps, from_one, by_kernel)  # type: ignore[no-untyped-call]
            return normed_ND.view(x.shape)  # type: ignore[no-any-return]

    return called_as(kind, OneNorm)
