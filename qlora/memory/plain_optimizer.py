"""The optimizer of other stacks, for comparison in the estimator: over the parameters themselves, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.third_party import import_bitsandbytes

PAGED_FROM_VALUES = 100_000  # bitsandbytes/optim/optimizer.py, get_state_buffer: smaller state is never paged


class PlainOptimizer:
    """torch's or bitsandbytes' own, without master copies. Gradients stay where backward leaves them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], name: str, on_gpu: bool) -> None:
        self.parameters, self.paged = dict(parameters), on_gpu and name.startswith("paged_")
        self.inner = _make(name, [*parameters.values()], on_gpu)

    buffer_sizes: tuple[int, ...] = ()  # it has none that holds more than one tensor

    def add_gradient(self, key: str, gradient: Tensor) -> None:
        self.parameters[key].grad = gradient.contiguous()

    def gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))  # type: ignore[no-any-return]

    def clip(self, norm: Tensor, max_norm: float) -> None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)

    def step(self, learning_rate: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        self.detach()

    def detach(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @property
    def paged_bytes(self) -> int:
        """What bitsandbytes lets the driver move: the moments of large tensors."""
        found = [state.get(slot) for state in self.inner.state.values() for slot in ("state1", "state2")]
        large = [value for value in found if value is not None and value.numel() >= PAGED_FROM_VALUES]
        return sum(value.nbytes for value in large) if self.paged else 0


def _make(name: str, parameters: list[nn.Parameter], on_gpu: bool) -> Any:
    optim = import_bitsandbytes().optim
    if name == "adamw":  # torch chooses `foreach` by itself on a GPU
        return torch.optim.AdamW(parameters, lr=0.0, foreach=on_gpu)
    if name == "lion_8bit":
        return optim.Lion8bit(parameters, lr=1.0)
    bits = optim.AdamW8bit if name.endswith("8bit") else optim.AdamW32bit
    return bits(parameters, lr=0.0)
