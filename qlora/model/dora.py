"""DoRA's norms without a matrix that peft makes for them: the same numbers, bit for bit.

The norm of a row of W + s B A needs the product B A. peft computes it by sending the identity through both adapters
(tuners/lora/dora.py, get_lora_weight), because their weights may be shards elsewhere: 411 MB for a layer whose input is
14,336 wide, in bf16, in every forward pass and again where it is recomputed. What the identity gives is A, transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def without_identity(model: nn.Module) -> None:
    """Has every DoRA layer of `model` compute its product directly; the norm takes no gradient, and nor does it."""
    for layer in model.modules():
        if type(layer).__name__ == "DoraLinearLayer":
            layer.get_lora_weight = _product  # type: ignore[assignment]


def restart_magnitudes(model: Any, adapter: str) -> None:
    """DoRA's magnitudes as its forward pass computes norms, so that their quotient is exactly 1 at step 0."""
    for layer in model.modules():
        magnitudes = getattr(layer, "lora_magnitude_vector", None)
        if not magnitudes or adapter not in magnitudes:
            continue
        magnitude = magnitudes[adapter]
        magnitude.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[adapter].weight.detach(),
            lora_B=layer.lora_B[adapter].weight.detach(),
            scaling=layer.scaling[adapter],
        )
        magnitude.weight.data = magnitude.weight.data.float()


@contextmanager
def norms_later(later: bool) -> Iterator[None]:
    """Inside, peft reads no weight for the norms of a new DoRA layer, which begin as zeros, if they come `later`: of
    streamed layers no weight is there then."""
    if not later:
        yield
        return
    from peft.tuners.lora.dora import DoraLinearLayer

    own = DoraLinearLayer.update_layer
    DoraLinearLayer.update_layer = _no_norms  # type: ignore[method-assign]
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = own  # type: ignore[method-assign]


def _no_norms(layer: Any, *, lora_B: Tensor, **_: Any) -> None:
    layer.weight = nn.Parameter(torch.zeros(lora_B.shape[0], dtype=lora_B.dtype, device=lora_B.device))


@torch.no_grad()
def _product(lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
    """B A (out, in). The same product of the same shapes as peft's, so that it is summed in the same order."""
    transposed: Tensor = lora_B(lora_A.weight.t().contiguous())
    return transposed.t()
