"""What a run really took, to be held beside what was predicted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.device import peak_bytes as device_peak_bytes
from qlora.model.weight_receiving import bytes_on_device
from qlora.step.optimizer import AdapterOptimizer


@dataclass(frozen=True)
class Measured:
    """What a run really took: its peak, and what it kept all along."""

    peak_bytes: int
    weights_bytes: int
    adapters_bytes: int
    optimizer_bytes: int
    torch_version: str


def measure(model: Any, optimizer: AdapterOptimizer, device: torch.device) -> Measured:
    """Read from the model and its optimizer as they are now."""
    trained = list(optimizer.parameters.values())
    known = {id(parameter) for parameter in trained}
    frozen = {id(tensor): tensor for tensor in _tensors_of(model) if id(tensor) not in known}
    return Measured(
        peak_bytes=peak_bytes(device),
        weights_bytes=bytes_on_device(model, frozen.values()),
        adapters_bytes=_total(trained),
        optimizer_bytes=optimizer.kept_bytes,
        torch_version=torch.__version__,
    )


def _tensors_of(model: Any) -> Iterator[Tensor]:
    """Parameters and buffers, and the constants of 4-bit weights."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        constants = (getattr(one, name, None) for one in (state, nested) for name in ("absmax", "code", "offset"))
        yield from (value for value in constants if isinstance(value, Tensor))


def _total(tensors: Any) -> int:
    return sum(int(tensor.nbytes) for tensor in tensors)


def peak_bytes(device: torch.device) -> int:
    """On a GPU the allocator's peak of live tensors; without one the process's peak of resident memory."""
    if (counted := device_peak_bytes(device)) is not None:
        return counted
    if sys.platform == "win32":
        return 0  # resource is a POSIX module; the CPU path on Windows has no figure
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
