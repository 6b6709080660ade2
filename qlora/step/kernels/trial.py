"""Whether the kernels run on a device: there is Triton, it compiles for this card, and what comes out is right."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from qlora.device import is_card
from qlora.errors import foreign_failures
from qlora.step.kernels import operators

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
    """Every kernel gives there what its twin gives on a CPU; weights to the bit."""
    with foreign_failures(trial=True) as failure:
        (right_weight, *right), (weight, *found) = _outcomes(torch.device("cpu")), _outcomes(device)
    if failure.error is not None:
        return False
    near = all((one - other).norm() <= TOLERANCE * other.norm() for one, other in zip(found, right, strict=True))
    return near and torch.equal(weight, right_weight)


def _outcomes(device: torch.device) -> list[Tensor]:
    """What every kernel gives on `device`, on the host: a weight of 300 constants, which are more than have one nested
    constant, then the others' in float32."""
    x = torch.linspace(-3, 3, 2 * 96).view(2, 96).to(device)
    weight = torch.linspace(0.5, 1.5, 96).to(device)
    codes = (torch.arange(60 * 320 // 2, device=device) % 256).to(torch.uint8)
    constants = (torch.arange(300) * 7 % 256).to(torch.uint8)
    nested = (torch.linspace(-1, 1, 256), torch.tensor([0.5, 0.7]), torch.tensor(0.01))
    tables = tuple(one.to(device) for one in (torch.linspace(-1, 1, 16), constants, *nested))
    found = [operators.dequantize(codes, tables, (60, 320), torch.bfloat16)]
    found.append(operators.gated(x, x.flip(0)))
    for from_one in (False, True):
        y, inverse = operators.rms_norm(x, weight, 1e-6, from_one)
        found += [y, inverse, operators.rms_norm_backward(x.flip(1), x, weight, inverse, from_one)]
    over = [x.flip(1), x.clone(), x.flip(0)]
    operators.gated_backward_(over[0], over[1], over[2])
    return [one.cpu() for one in (*found, *over)]
