"""The update as bitsandbytes' and torch's own classes make it, one tensor after the other: what ours must equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.flat.methods import BETAS, EPSILON, LION_BETAS
from qlora.third_party import import_bitsandbytes

bnb = import_bitsandbytes()


class TensorByTensor:
    """fp32 masters of named parameters, each with a gradient and moments of its own."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], name: str, weight_decay: float) -> None:
        self.parameters = dict(parameters)
        self.masters = {key: nn.Parameter(parameter.detach().float()) for key, parameter in parameters.items()}
        self.inner = self._make(name, weight_decay)

    def _make(self, name: str, weight_decay: float) -> Any:
        masters = [*self.masters.values()]
        if name == "adamw":
            return torch.optim.AdamW(masters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
        if name == "lion_8bit":
            return bnb.optim.Lion8bit(masters, lr=1.0, betas=LION_BETAS, weight_decay=weight_decay)
        bits = bnb.optim.AdamW8bit if name.endswith("8bit") else bnb.optim.AdamW32bit
        return bits(masters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)

    def add_gradient(self, key: str, gradient: Tensor) -> None:
        if self.masters[key].grad is None:
            self.masters[key].grad = gradient.float()
        else:
            self.masters[key].grad.add_(gradient)  # type: ignore[union-attr]

    def gradient_norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(m.grad) if m.grad is not None else m.new_zeros(()) for m in self._all()]
        return torch.linalg.vector_norm(torch.stack([norm.detach() for norm in norms]))  # type: ignore[no-any-return]

    def clip(self, norm: Tensor, max_norm: float) -> None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for master in self._all():
            if master.grad is not None:
                master.grad.mul_(scale)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        for key, parameter in self.parameters.items():
            parameter.copy_(self.masters[key])
            self.masters[key].grad = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """As a checkpoint of the time when tensors were updated one by one holds it."""
        tensors = {f"master/{key}": master.detach().clone() for key, master in self.masters.items()}
        counters: dict[str, int] = {}
        for key, master in self.masters.items():
            for slot, value in self.inner.state.get(master, {}).items():
                if isinstance(value, Tensor) and slot != "step" and not slot.startswith("qmap"):
                    tensors[f"{slot}/{key}"] = value.detach().clone()
                elif slot == "step":
                    counters[key] = int(value)
        return tensors, counters

    def _all(self) -> list[nn.Parameter]:
        return [*self.masters.values()]
