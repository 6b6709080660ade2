"""The update: bf16 adapters, fp32 master copies, bitsandbytes' 8-bit and paged optimizers over the masters.

A bf16 weight of 0.01 cannot move by less than 0.00004: at a learning rate of 2e-4 and its decay most updates would be
lost, so the optimizer works on fp32 copies (4 bytes for each adapter parameter, 168 MB at rank 16 on an 8B model).
Gradients are added up in fp32 too: each one is moved into its master's as soon as it is complete, and the bf16 one is
freed, so that accumulation loses nothing and no bf16 gradient waits for the end of the backward pass.

Masters, gradients and moments of all parameters lie in one buffer each (`flat.layout`): an update is one call to
bitsandbytes, and the same as tensor by tensor, bit for bit. bitsandbytes' own classes make a call a tensor and wait for
the device after each. A parameter without a gradient is left out, as there: neither its weight nor its moments decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from qlora.device import to_host
from qlora.flat.layout import Layout
from qlora.flat.methods import METHODS
from qlora.flat.moments import Moments


class AdapterOptimizer:
    """Owns the masters of named parameters, their gradients and their moments. All are on one device."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], name: str, weight_decay: float) -> None:
        self.parameters, self.weight_decay, method = dict(parameters), weight_decay, METHODS[name]
        self.device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
        shapes = {key: parameter.shape for key, parameter in parameters.items()}
        self._layout = Layout(shapes, method.eight_bit)
        self._master = self._layout.zeros(self.device)
        self.masters = self._in_order(self._master)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                self.masters[key].copy_(parameter)
        self.moments = Moments(self._layout, method, self.device, name.startswith("paged_"))
        self.updates: dict[str, int] = {}  # how often each parameter was updated
        # The largest norm that each parameter's gradient ever had: zero at the end of a run means it never learned.
        self.largest_gradients = torch.zeros(len(self.masters), device=self.device)
        self._norms: Tensor | None = None  # of the gradient that `gradient_norm` saw, until the update
        self._gradient: Tensor | None = None  # made with the first one
        self._gradients: dict[str, Tensor] = {}
        self._complete: set[str] = set()  # parameters that have a gradient; the others' values are old
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._collect, key))  # type: ignore[no-untyped-call]
            for key, parameter in self.parameters.items()
        ]

    @property
    def kept_bytes(self) -> int:
        """What is kept from update to update beside the parameters: masters and moments."""
        return int(self._master.nbytes + self.moments.buffer.nbytes)

    @property
    def buffer_sizes(self) -> list[int]:
        """Bytes of each buffer: masters, moments, and gradients from the first one on."""
        return [flat.nbytes for flat in (self._master, self.moments.buffer, self._gradient) if flat is not None]

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The fp32 gradients added up since the last update, of parameters that have one."""
        return {key: gradient for key, gradient in self._gradients.items() if key in self._complete}

    @torch.no_grad()
    def add_gradient(self, key: str, gradient: Tensor) -> None:
        """Add a micro-batch's gradient of one parameter to those of the others."""
        self._make_gradient()
        if key in self._complete:
            self._gradients[key].add_(gradient)
        else:
            self._gradients[key].copy_(gradient)
            self._complete.add(key)

    @torch.no_grad()
    def flat_gradient(self, complete: Iterable[str]) -> Tensor:
        """The buffer of all gradients, zero where there is none here, for others' to be added to it; from now on the
        parameters `complete` have one."""
        flat = self._make_gradient()
        for key in self._gradients.keys() - self._complete:
            self._gradients[key].zero_()
        self._complete = set(complete)
        return flat

    def _make_gradient(self) -> Tensor:
        if self._gradient is None:
            self._gradient = self._layout.zeros(self.device)
            self._gradients = self._in_order(self._gradient)
        return self._gradient

    def unscale(self, factor: int) -> None:
        """Divide the gradient by a power of two, of `qlora/loss_scale.py`: no digit is lost."""
        if factor != 1 and self._gradient is not None:
            self._gradient.mul_(1.0 / factor)

    def gradient_norm(self) -> Tensor:
        """2-norm of the whole gradient in fp32, a scalar still on the device."""
        zero, gradients = self.largest_gradients.new_zeros(()), self.gradients
        norms = dict(zip(gradients, torch._foreach_norm([*gradients.values()]) if gradients else (), strict=True))
        self._norms = torch.stack([norms.get(key, zero) for key in self.masters])
        return torch.linalg.vector_norm(self._norms)  # type: ignore[no-any-return]

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale the gradient down to `max_norm` where it is longer; 0 is off. Asks the device nothing."""
        if max_norm > 0 and self._gradient is not None:
            self._gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the masters, round them into the parameters, and drop the gradients. Asks the device nothing."""
        if self._norms is not None:
            self.largest_gradients = torch.maximum(self.largest_gradients, self._norms)
        if self._gradient is not None and self._complete:
            now = {key: self.updates.get(key, 0) + 1 for key in self._complete}
            self.moments.update(self._master, self._gradient, now, learning_rate, self.weight_decay)
            self.updates |= now
        self.write_back()
        self.zero_gradients()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters that the model computes with."""
        if self.parameters:
            torch._foreach_copy_([*self.parameters.values()], [*self.masters.values()])

    def zero_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self._complete.clear()
        self._norms = None

    def detach(self) -> None:
        """At the end: leave the parameters alone, and give back all buffers, whoever still refers to this object."""
        for hook in self._hooks:
            hook.remove()
        self.zero_gradients()
        self.moments.free()
        self._gradient, self._gradients, self.masters = None, {}, {}
        self._master = self._layout.zeros(torch.device("meta"))

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that the next update depends on: tensors by name, on the host, and the update counters.

        `master/<parameter>` are the fp32 copies, `<slot>/<parameter>` the optimizer's moments and their scales,
        `largest_gradients` one number a parameter. Tensor by tensor, whatever the buffers' order is.
        """
        masters, moments = self._in_order(to_host(self._master)), self.moments.on_host()
        tensors = {f"master/{key}": master for key, master in masters.items()}
        tensors["largest_gradients"] = to_host(self.largest_gradients)
        counters = {key: self.updates[key] for key in self.masters if key in self.updates}
        for key in counters:
            tensors |= {f"{slot}/{key}": value for slot, value in moments.of_tensor(key).items()}
        return tensors, counters

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Put back what `state` gave, into the memory that is there already: paged state stays paged.

        Raises KeyError or ValueError when the tensors are of another model; nothing is changed then.
        """
        largest, master = to_host(self.largest_gradients), self._layout.zeros(torch.device("cpu"))
        _copy(largest, tensors["largest_gradients"])
        for key, target in self._in_order(master).items():
            _copy(target, tensors[f"master/{key}"])
        buffer, moments = self.moments.empty_on_host()
        updates = {key: counters[key] for key in self.masters if key in counters}
        for key in updates:
            for slot, target in moments.of_tensor(key).items():
                _copy(target, tensors[f"{slot}/{key}"])
        self.largest_gradients.copy_(largest)
        self._master.copy_(master)
        self.moments.put_back(buffer)
        self.updates = updates
        self.write_back()

    def _collect(self, key: str, parameter: Tensor) -> None:
        """Move a complete gradient to its master's."""
        if parameter.grad is not None:
            self.add_gradient(key, parameter.grad)
            parameter.grad = None

    def _in_order(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors of a flat buffer, in the order of the parameters."""
        views = self._layout.views(flat)
        return {key: views[key] for key in self.parameters}


def _copy(target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f"state of shape {tuple(source.shape)} {source.dtype} for {tuple(target.shape)} {target.dtype}"
        )
    target.copy_(source)
