"""What a run took: its peak, and the bytes of what is frozen, trained and kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from qlora.memory.measured import measure, peak_bytes

CPU = torch.device("cpu")


def test_what_is_trained_is_not_counted_with_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False))
    model.register_buffer("table", torch.zeros(16))
    optimizer: Any = SimpleNamespace(parameters={"last": model[1].weight}, kept_bytes=96)
    found = measure(model, cast(Any, optimizer), CPU)
    assert (found.weights_bytes, found.adapters_bytes, found.optimizer_bytes) == (4 * (32 + 16), 4 * 8, 96)
    assert found.peak_bytes > 1 << 20 and found.torch_version == torch.__version__


def test_the_peak_of_a_process_never_falls() -> None:
    before = peak_bytes(CPU)
    held = torch.ones(1 << 24)
    assert held.nbytes == 1 << 26 and peak_bytes(CPU) >= before
