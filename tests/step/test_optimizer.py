"""fp32 masters under bf16 adapters, and a state that can be taken out and put back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora.step.optimizer import AdapterOptimizer

NAMES = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw", "lion_8bit")


def make_parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # One above bitsandbytes' 4,096 elements, from where on its state is 8 bit, and one below.
    shapes = {"large.A": (96, 64), "small.B": (8, 16)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def train(parameters: dict[str, nn.Parameter], optimizer: AdapterOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        loss = sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum() for p in parameters.values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_is_bit_exact(name: str) -> None:
    straight = make_parameters()
    train(straight, AdapterOptimizer(straight, name, 0.01), range(8))

    first = make_parameters()
    optimizer = AdapterOptimizer(first, name, 0.01)
    train(first, optimizer, range(3))
    tensors, counters = optimizer.state()

    second = make_parameters()
    resumed = AdapterOptimizer(second, name, 0.01)
    resumed.load_state(tensors, counters)
    assert all(torch.equal(second[key], first[key]) for key in first)
    train(second, resumed, range(3, 8))
    assert all(torch.equal(second[key], straight[key]) for key in straight)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_moves_down_the_gradient(name: str) -> None:
    parameters = {"w": nn.Parameter(torch.full((96, 64), 1.0, dtype=torch.bfloat16))}
    optimizer = AdapterOptimizer(parameters, name, 0.0)
    for _ in range(20):
        parameters["w"].float().square().sum().backward()
        optimizer.step(1e-2)
    assert parameters["w"].float().abs().max() < 0.9


def test_small_updates_are_not_lost() -> None:
    """An update of 1e-5 on a weight of 1.0 is below bf16's step of 0.0078: without masters nothing would ever move."""
    parameters = {"w": nn.Parameter(torch.ones(64, 96, dtype=torch.bfloat16))}
    optimizer = AdapterOptimizer(parameters, "adamw", 0.0)
    for _ in range(1000):
        parameters["w"].sum().backward()
        optimizer.step(1e-5)
    assert parameters["w"].max() < 1.0


def test_gradients_are_added_in_fp32() -> None:
    """Many small gradients after a large one: in bf16 each of them would round to nothing."""
    parameters = {"w": nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))}
    optimizer = AdapterOptimizer(parameters, "adamw", 0.0)
    (parameters["w"] * 256.0).sum().backward()
    for _ in range(64):
        (parameters["w"] * 0.25).sum().backward()
    gradient = optimizer.masters["w"].grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((4,), 272.0))
    assert parameters["w"].grad is None


def test_clip_scales_to_the_norm_and_zero_is_off() -> None:
    parameters = make_parameters(torch.float32)
    optimizer = AdapterOptimizer(parameters, "adamw", 0.0)
    sum((p * 100).sum() for p in parameters.values()).backward()  # type: ignore[union-attr]
    norm = optimizer.gradient_norm()
    optimizer.clip(norm, 0.0)
    assert torch.equal(optimizer.gradient_norm(), norm)
    optimizer.clip(norm, 2.0)
    assert float(optimizer.gradient_norm()) == pytest.approx(2.0, rel=1e-5)


def test_state_of_another_model_is_refused() -> None:
    optimizer = AdapterOptimizer(make_parameters(), "adamw", 0.0)
    tensors, counters = optimizer.state()
    tensors["master/small.B"] = tensors["master/small.B"][:4]
    with pytest.raises(ValueError, match="state of shape"):
        optimizer.load_state(tensors, counters)
