"""The update: bf16 adapters, fp32 master copies, bitsandbytes' 8-bit and paged optimizers over the masters.

A bf16 weight of 0.01 cannot move by less than 0.00004: at a learning rate of 2e-4 and its decay most updates would be
lost, so the optimizer works on fp32 copies (4 bytes for each adapter parameter, 168 MB at rank 16 on an 8B model).
Gradients are added up in fp32 too: each one is moved into its master as soon as it is complete, and the bf16 one is
freed, so that accumulation loses nothing and no bf16 gradient waits for the end of the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.third_party import import_bitsandbytes

bnb = import_bitsandbytes()

BETAS = (0.9, 0.999)  # Adam (Kingma & Ba 2015, section 2), the default of every library of the field
EPSILON = 1e-8
LION_BETAS = (0.9, 0.99)  # Lion (Chen et al. 2023, section 3.2)


class AdapterOptimizer:
    """Owns the masters of named parameters and the optimizer over them."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], name: str, weight_decay: float, masters: bool = True
    ) -> None:
        """A parameter in fp32 is its own master. `masters=False` makes each one so: for comparison in the estimator."""
        self.parameters = dict(parameters)
        self.masters = {
            key: nn.Parameter(parameter.detach().float()) if masters and parameter.dtype != torch.float32 else parameter
            for key, parameter in parameters.items()
        }
        on_gpu = any(parameter.is_cuda for parameter in self.parameters.values())
        self.paged = name.startswith("paged_") and on_gpu
        self.inner = _make(name, list(self.masters.values()), weight_decay, self.paged)
        # The largest norm that each parameter's gradient ever had: zero at the end of a run means it never learned.
        device = next((master.device for master in self.masters.values()), torch.device("cpu"))
        self.largest_gradients = torch.zeros(len(self.masters), device=device)
        self._norms: Tensor | None = None  # of the gradient that `gradient_norm` saw, until the update
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_collect, self.masters[key]))  # type: ignore[no-untyped-call]
            for key, parameter in self.parameters.items()
            if self.masters[key] is not parameter
        ]

    def gradient_norm(self) -> Tensor:
        """2-norm of the whole gradient in fp32, a scalar still on the device."""
        zero = self.largest_gradients.new_zeros(())
        gradients = [master.grad for master in self.masters.values()]
        self._norms = torch.stack([zero if grad is None else torch.linalg.vector_norm(grad) for grad in gradients])
        return torch.linalg.vector_norm(self._norms)  # type: ignore[no-any-return]

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale the gradient down to `max_norm` where it is longer; 0 is off. Asks the device nothing."""
        if max_norm > 0:
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad.mul_(scale)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the masters, round them into the parameters, and drop the gradients."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        if self._norms is not None:
            self.largest_gradients = torch.maximum(self.largest_gradients, self._norms)
        self.inner.step()
        self.write_back()
        self.zero_gradients()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters that the model computes with."""
        for key, parameter in self.parameters.items():
            if self.masters[key] is not parameter:
                parameter.copy_(self.masters[key])

    def zero_gradients(self) -> None:
        for key, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[key].grad = None
        self._norms = None

    def detach(self) -> None:
        """Leave the parameters alone from now on: their gradients are no longer gathered here."""
        for hook in self._hooks:
            hook.remove()
        self.zero_gradients()

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that the next update depends on: tensors by name, on the host, and the update counters.

        `master/<parameter>` are the fp32 copies, `<slot>/<parameter>` the optimizer's moments and their scales,
        `largest_gradients` one number a parameter.
        """
        tensors = {f"master/{key}": _to_host(master) for key, master in self.masters.items()}
        tensors["largest_gradients"] = _to_host(self.largest_gradients)
        counters: dict[str, int] = {}
        for key, master in self.masters.items():
            for slot, value in self.inner.state.get(master, {}).items():
                if slot.startswith("qmap"):
                    continue  # the constant code table, the same in every run
                if isinstance(value, Tensor) and slot != "step":
                    tensors[f"{slot}/{key}"] = _to_host(value)
                else:
                    counters[key] = int(value)
        return tensors, counters

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Put back what `state` gave, into the memory that the optimizer allocates itself.

        bitsandbytes' own load_state_dict moves paged state to the GPU for good; copying into its own freshly made
        buffers keeps it paged. Raises KeyError or ValueError when the tensors are of another model.
        """
        _copy(self.largest_gradients, tensors["largest_gradients"])
        for group_index, group in enumerate(self.inner.param_groups):
            for index, (key, master) in enumerate(self.masters.items()):
                _copy(master, tensors[f"master/{key}"])
                if key not in counters:
                    continue
                state = self.inner.state[master]
                if isinstance(self.inner, torch.optim.AdamW):
                    state["step"] = torch.tensor(float(counters[key]))
                    state["exp_avg"] = torch.zeros_like(master)
                    state["exp_avg_sq"] = torch.zeros_like(master)
                else:
                    self.inner.init_state(group, master, group_index, index)
                    state["step"] = counters[key]
                for slot, value in state.items():
                    if isinstance(value, Tensor) and slot != "step" and not slot.startswith("qmap"):
                        _copy(value, tensors[f"{slot}/{key}"])
        self.write_back()


def _collect(master: Tensor, parameter: Tensor) -> None:
    """Move a complete gradient into its master."""
    if parameter.grad is None:
        return
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None


def _make(name: str, masters: list[nn.Parameter], weight_decay: float, paged: bool) -> Any:
    """The optimizer that the recipe names. The paged ones need a driver that can page: elsewhere they are plain."""
    if name == "adamw":
        return torch.optim.AdamW(masters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
    if name == "lion_8bit":
        return bnb.optim.Lion8bit(masters, lr=1.0, betas=LION_BETAS, weight_decay=weight_decay)
    bits = bnb.optim.AdamW8bit if name.endswith("8bit") else bnb.optim.AdamW32bit
    return bits(masters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, is_paged=paged)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory that the next update cannot change. Paged tensors read as host memory already."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _copy(target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f"state of shape {tuple(source.shape)} {source.dtype} for {tuple(target.shape)} {target.dtype}"
        )
    target.copy_(source)
