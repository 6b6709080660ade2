"""A tiny model with adapters that say something, in fp32, and the gradients that work on it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.events import Recorder
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection


def adapted(base: Path) -> Any:
    """The base in fp32 with fp32 adapters whose B is not zero."""
    found = resolve(str(base), "main", Recorder())
    network = load.load_base(found, QuantizationSection(type="none"), "auto", torch.device("cpu"), Recorder()).float()
    wrapped = adapters.attach(network, LoraSection(r=4), seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapters.trainable(wrapped).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return wrapped.train()


def gradients(model: Any, work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """What `work` gives, and every gradient that it has left."""
    model.zero_grad(set_to_none=True)
    loss = work()
    return float(loss), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def is_the_formula(model: Any, ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
    """The loss that `ours` gives and the gradients that it leaves are those of the plain formula, within 1e-5."""

    def differentiated() -> Tensor:
        loss = plain()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    loss, gradient = gradients(model, ours)
    expected, of_plain = gradients(model, differentiated)
    assert abs(loss - expected) <= 1e-5 * max(1.0, abs(expected))
    assert float((gradient - of_plain).abs().max()) <= 1e-5 * max(1.0, float(of_plain.abs().max()))
    assert float(of_plain.abs().max()) > 1e-4
