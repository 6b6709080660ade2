"""Tensors of awkward sizes, the same gradients for two optimizers, and a stand-in for bitsandbytes' managed memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from qlora.flat import managed
from qlora.third_party import import_bitsandbytes

# No multiple of a block of 256, smaller than one, one value, below and above 4,096 values, DoRA's magnitudes (fp32)
# and a module that is trained whole.
SHAPES = {
    "l.0.lora_A": (96, 64),
    "l.0.lora_B": (8, 16),
    "l.1.lora_A": (4097,),
    "l.1.lora_B": (33, 131),
    "l.1.lora_magnitude_vector": (4999,),
    "l.2.lora_magnitude_vector": (77,),
    "head.modules_to_save": (1009, 37),
    "one": (1,),
    "l.3.lora_A": (257, 16),
}
# Which have no gradient in a step: their updates' numbers differ from the others' from then on.
ASLEEP = {"l.1.lora_A": {2, 3, 7}, "l.0.lora_B": {2, 3, 7}, "one": {0, 1, 2, 3}, "l.3.lora_A": set(range(99))}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, shape in SHAPES.items():
        dtype = torch.float32 if "magnitude" in key else torch.bfloat16
        made[key] = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    return made


def one_step(optimizer: Any, step: int, max_norm: float) -> torch.Tensor:
    """Two micro-batches' gradients of step `step`, over ten orders of size, and an update; the gradient's norm."""
    generator = torch.Generator().manual_seed(100 + step)
    for _ in range(2):
        for key, parameter in optimizer.parameters.items():
            size = 10 ** torch.randn(parameter.shape, generator=generator)
            gradient = (torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype)
            if key == "head.modules_to_save":
                gradient[:64] = 0  # blocks without anything to learn
            if step not in ASLEEP.get(key, ()):
                optimizer.add_gradient(key, gradient)
    norm: torch.Tensor = optimizer.gradient_norm()
    if max_norm > 0:
        optimizer.clip(norm, max_norm)
    optimizer.step(1e-3)
    return norm


@dataclass
class Driver:
    """What was asked of the driver, in order; `given` are the addresses that it handed out and were not freed."""

    asked: list[str] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    concurrent: bool = True
    kept: list[torch.Tensor] = field(default_factory=list)

    def get_paged(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made = torch.full(shape, 7, dtype=dtype)  # what was there before is anything
        self.kept.append(made)
        self.given.append(made.data_ptr())
        self.asked.append("get")
        return made

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        tensor.fill_(value)

    def prefetch_tensor(self, tensor: torch.Tensor) -> None:
        assert tensor.data_ptr() in self.given
        self.asked.append("prefetch")

    def free(self, address: Any) -> int:
        self.given.remove(address.value)
        self.asked.append("free")
        return 0

    def wait(self, _: torch.device) -> None:
        self.asked.append("wait")


def driver_of(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """bitsandbytes' paged tensors on a machine without a GPU: the CPU is taken for one that can page."""
    driver, real, functional = Driver(), managed.why_not, import_bitsandbytes().functional
    for name in ("get_paged", "fill", "prefetch_tensor"):
        monkeypatch.setattr(functional, name, getattr(driver, name))
    monkeypatch.setattr(managed, "_runtime", lambda name: driver.free if name == "cudaFree" else None)
    monkeypatch.setattr("qlora.device.synchronize", driver.wait)
    monkeypatch.setattr("qlora.flat.moments.synchronize", driver.wait)
    able = lambda device, count: "" if device.type == "cpu" else real(device, count)  # noqa: E731
    monkeypatch.setattr("qlora.flat.moments.why_not", able)
    return driver
