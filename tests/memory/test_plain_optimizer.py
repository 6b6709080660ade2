"""Other stacks' optimizers in the estimator: over the parameters themselves, paged from 100,000 values on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora.flat.methods import METHODS
from qlora.memory.plain_optimizer import PlainOptimizer


@pytest.mark.parametrize("name", METHODS)
def test_it_updates_the_parameters_themselves(name: str) -> None:
    weight = nn.Parameter(torch.ones(64, 96))
    optimizer = PlainOptimizer({"w": weight}, name, on_gpu=False)
    optimizer.add_gradient("w", torch.ones(()).expand(64, 96))
    optimizer.clip(optimizer.gradient_norm(), 1.0)
    assert float(optimizer.gradient_norm()) == pytest.approx(1.0, rel=1e-4)
    optimizer.step(1e-3)
    assert weight.max() < 1.0 and weight.grad is None


def test_only_large_tensors_moments_are_paged_and_only_on_a_gpu() -> None:
    shapes = {"large": (400, 250), "small": (399, 250)}
    for on_gpu, name, paged in (
        (True, "paged_adamw_8bit", 200_000),
        (True, "adamw_8bit", 0),
        (False, "paged_adamw_8bit", 0),
    ):
        weights = {key: nn.Parameter(torch.ones(shape)) for key, shape in shapes.items()}
        optimizer = PlainOptimizer(weights, name, on_gpu)
        for key, weight in weights.items():
            optimizer.add_gradient(key, torch.ones_like(weight))
        optimizer.step(1e-3)
        assert optimizer.paged_bytes == paged
