"""Whether the kernels run on a device: there is Triton, it compiles for this card, and what comes out is right."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.util import find_spec

import torch

from qlora.device import is_card
from qlora.errors import foreign_failures

# Relative to what is right, in float32: a kernel that computes something else is off by 0.1 and more.
TOLERANCE = 1e-4


def expected() -> bool:
    """Whether a card on this system will have them: on Linux Triton comes with torch, elsewhere it must be there."""
    return sys.platform == "linux" or find_spec("triton") is not None


def work(device: torch.device) -> bool:
    """Whether they run on `device`; on a CPU they do not."""
    return is_card(device) and find_spec("triton") is not None and _right(device)


@lru_cache(8)
def _right(device: torch.device) -> bool:
    from qlora.step.kernels import operators

    x = torch.linspace(-3, 3, 2 * 96).view(2, 96)
    weight = torch.linspace(0.5, 1.5, 96)
    with foreign_failures(trial=True) as failure:
        right = operators.rms_norm(operators.gated(x, x.flip(0)), weight, 1e-6, False)[0]
        there = x.to(device)
        found = operators.rms_norm(operators.gated(there, there.flip(0)), weight.to(device), 1e-6, False)[0].cpu()
    return failure.error is None and bool((found - right).norm() <= TOLERANCE * right.norm())
