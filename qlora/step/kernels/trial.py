"""Whether the kernels run on a device: there is Triton, it compiles for this card, and what comes out is right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from qlora.device import computes_bf16, is_card
from qlora.errors import foreign_failures
from qlora.step.kernels import experts, operators
from qlora.step.kernels.experts import Packed

# Relative to what is right, in float32: a kernel that computes something else is off by 0.1 and more.
TOLERANCE = 1e-4
_BF16 = 2**-7  # the step of bf16's 8 bits


def expected() -> bool:
    """Whether a card on this system will have them: on Linux Triton comes with torch, elsewhere it must be there."""
    return sys.platform == "linux" or find_spec("triton") is not None


def work(device: torch.device) -> bool:
    """Whether they run on `device`; on a CPU they do not."""
    return is_card(device) and find_spec("triton") is not None and _right(device)


@lru_cache(8)
def _right(device: torch.device) -> bool:
    """Every kernel gives there what its twin gives on a CPU; weights to the bit."""
    return _alike(_outcomes, device, TOLERANCE)


def multiplies_experts(device: torch.device) -> bool:
    """As `work`, of the product with experts in 4 bit; from Ampere on, for which Triton has tensor cores (for Turing it
    makes single sums of the product, 255 registers with 400 bytes spilled: torch's chunks are faster)."""
    may = is_card(device) and computes_bf16(device) and find_spec("triton") is not None
    return may and _right_with_experts(device)


@lru_cache(8)
def _right_with_experts(device: torch.device) -> bool:
    """Constants and places to the bit; a product in bf16 is a sum in another order, rounded once."""
    return _alike(_of_experts, device, _BF16)


def _alike(outcomes: Callable[[torch.device], list[Tensor]], device: torch.device, tolerance: float) -> bool:
    """Whether `device` gives what a CPU does: of the outcomes the first to the bit, the others relatively."""
    with foreign_failures(trial=True) as failure:
        (exact, *right), (first, *found) = outcomes(torch.device("cpu")), outcomes(device)
    if failure.error is not None or not torch.equal(first, exact):
        return False
    return all((one - other).norm() <= tolerance * other.norm() for one, other in zip(found, right, strict=True))


def _of_experts(device: torch.device) -> list[Tensor]:
    """Constants and places; and products of more columns than a tile has, for tiles of few and of many rows: three
    experts, one of them without rows, in NF4's form and in MXFP4's, forth and back."""
    of_constants = (torch.linspace(-1, 1, 6).view(3, 2), torch.linspace(-1, 1, 256), torch.tensor([0.01, 0.2, 0.3]))
    nested, values, offset = (one.to(device) for one in of_constants)
    absmax = (torch.arange(3 * 512, device=device) * 7 % 256).to(torch.uint8).view(3, 512)
    constants = experts.unnest(absmax, nested, values, offset, 288)
    choices = torch.arange(1200, device=device).view(400, 3) * 7 % 11 % 4  # more than are looked at at a time
    exact = torch.cat([one.flatten().float() for one in (constants, *experts.route(choices, 5))])
    found, (out, width) = [exact], (144, 128)
    codes = (torch.arange(3 * out * width // 2, device=device) * 37 % 256).to(torch.uint8).view(3, -1)
    table = torch.linspace(-1, 1, 16, device=device)
    powers = (120 + torch.arange(3 * 576, device=device).view(3, 576) % 9).to(torch.uint8)
    forms = ((Packed(codes, constants, table, True), 64), (Packed(codes, powers, table, False), 32))
    for rows, (packed, block), back in product((20, 200), forms, (False, True)):
        ends = torch.tensor([rows - 11, rows - 11, rows], dtype=torch.int32, device=device)
        x = torch.linspace(-1, 1, rows * (out if back else width), device=device).sin().bfloat16()
        found.append(experts.grouped(x.view(rows, -1), packed, ends, (out, width, block), back).float())
    return [one.cpu() for one in found]


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
    return [one.cpu() for one in (*found, *over, *_fused(x), *_turned(x), *_losses(x))]


def _fused(x: Tensor) -> list[Tensor]:
    """More rows and columns than a tile has, and another rank for each of two adapters."""
    e, g = x.view(-1, 1).repeat(1, 150)[:40], x.view(1, -1).repeat(40, 1)[:, :150].contiguous()
    low_e, low_g, up_e, up_g = (x.view(-1)[: rows * rank].view(rows, rank) for rows, rank in _SHARES)
    adapters, scales = (low_e, low_g, torch.cat([up_e] * 5), torch.cat([up_g] * 5)), (0.5, 2.0)
    return [
        operators.gated_adapted(e, g, adapters, scales, False),
        operators.gated_adapted(e, g, adapters, scales, True),
        *(e, g),
    ]


_SHARES = ((40, 3), (40, 4), (30, 3), (30, 4))


def _turned(x: Tensor) -> list[Tensor]:
    """q of three heads and k of one, (2, heads, 4, 8), of which all columns are turned, or 6."""
    values = x.view(-1)
    q, k = values.view(2, 4, 3, 8).transpose(1, 2), values[:64].view(2, 1, 4, 8)
    found: list[Tensor] = []
    for form in operators.FORMS:
        for back, turned in ((False, 8), (True, 6)):
            tables = (values[: 4 * turned].view(1, 4, turned), values[-8 * turned :].view(2, 4, turned)[:1])
            found += operators.rope_qk(q, k, tables, form, back)
    return found


def _losses(x: Tensor) -> list[Tensor]:
    """Rows longer than what is read at a time, plain, and scaled and capped."""
    found, weights = [], torch.tensor([0.5, 2.0], device=x.device)
    for factor, cap in ((1.0, 0.0), (2.0, 4.0)):
        logits, targets = x.repeat(1, 50), torch.tensor([4000, 4799], device=x.device)
        found += [operators.cross_entropy_(logits, targets, weights, factor, cap), logits]
    return found
