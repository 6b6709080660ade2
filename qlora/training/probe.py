"""The worst first: what would fail late fails before step 1, and leaves no trace.

The longest micro-batch of the first epoch goes forward and back, the optimizer makes one update with its moments in
place, and the longest evaluation batch is measured. Weights, moments and random state are put back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qlora.device import with_own_random_state
from qlora.step.optimizer import AdapterOptimizer

Pack = tuple[int, ...]


def longest(packs: Sequence[Pack], lengths: Sequence[int], count: int) -> list[Pack]:
    """The `count` packs with the most tokens, the longest first."""
    return sorted(packs, key=lambda pack: (-sum(lengths[row] for row in pack), pack))[:count]


def restoring_state(optimizer: AdapterOptimizer, device: torch.device, work: Callable[[], None]) -> None:
    """Runs `work`, which may update the weights, and puts weights, moments, gradients and random state back."""
    tensors, counters = optimizer.state()
    rounded = {key: parameter.detach().to("cpu", copy=True) for key, parameter in optimizer.parameters.items()}
    try:
        with torch.random.fork_rng(devices=with_own_random_state(device)):
            work()
    finally:
        optimizer.zero_gradients()
        optimizer.inner.state.clear()
        optimizer.load_state(tensors, counters)
        with torch.no_grad():
            for key, parameter in optimizer.parameters.items():
                parameter.copy_(rounded[key])
