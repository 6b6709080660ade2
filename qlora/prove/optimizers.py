"""The update is the library's, tensor by tensor, and its state goes into a checkpoint and back without losing a bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.flat.methods import BETAS, EPSILON, LION_BETAS
from qlora.prove.proof import Figure, Outcome, Place, Proof, all_equal
from qlora.step.optimizer import AdapterOptimizer
from qlora.third_party import import_bitsandbytes

NAMES = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw", "lion_8bit")
SHAPES = {"a": (1024, 128), "b": (96, 33), "c": (8, 16)}  # large enough to be paged; no multiple of 256; tiny
RATE, UPDATES = 1e-3, 3


def run(place: Place) -> Outcome:
    wrong, measured = [], dict[str, Figure]()
    for name in NAMES:
        own = _own(name, place.device)
        for update in range(UPDATES):
            _update(own, update)
        apart = not all_equal(list(own.masters.values()), _by_library(name, place.device))
        tensors, counters = own.state()
        again = _own(name, place.device)
        again.load_state(tensors, counters)
        for one in (own, again):
            _update(one, UPDATES)
        lost = not all_equal(list(own.state()[0].values()), list(again.state()[0].values()))
        paged = [one.moments.memory is not None for one in (own, again)]
        measured |= {f"{name} is the library's": not apart, f"{name} comes back": not lost, f"{name} paged": paged[0]}
        wrong += [f"{name} comes back to another memory"] * (paged[0] != paged[1])
        wrong += [f"{name} is not the library's"] * apart + [f"{name} does not come back"] * lost
    return Outcome(not wrong, "; ".join(wrong) or f"{len(NAMES)} optimizers, {len(SHAPES)} sizes of tensors", measured)


def _own(name: str, device: torch.device) -> AdapterOptimizer:
    weights = {f"l.lora_A.{key}.weight": nn.Parameter(value) for key, value in _values(0, device).items()}
    return AdapterOptimizer(weights, name, 0.0)


def _values(seed: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).bfloat16().to(device) for key, shape in SHAPES.items()}


def _update(own: AdapterOptimizer, number: int) -> None:
    gradients = _values(number + 1, torch.device("cpu")).values()
    for key, gradient in zip(own.masters, gradients, strict=True):
        own.add_gradient(key, gradient.to(own.device))
    own.gradient_norm()
    own.step(RATE)


def _by_library(name: str, device: torch.device) -> list[Tensor]:
    """The masters after as many updates by the library itself, one tensor after the other and nothing paged."""
    bnb = import_bitsandbytes().optim
    masters = [nn.Parameter(value.float()) for value in _values(0, device).values()]
    adam: dict[str, Any] = {"lr": RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": 0.0}
    inner: Any
    if name == "adamw":
        inner = torch.optim.AdamW(masters, **adam, foreach=False)
    elif name == "lion_8bit":
        inner = bnb.Lion8bit(masters, lr=RATE, betas=LION_BETAS, weight_decay=0.0)
    else:
        inner = (bnb.AdamW8bit if name.endswith("8bit") else bnb.AdamW32bit)(masters, **adam)
    for number in range(UPDATES):
        for master, gradient in zip(masters, _values(number + 1, device).values(), strict=True):
            master.grad = gradient.float()
        inner.step()
    return [master.detach() for master in masters]


PROOF = Proof(
    name="optimizer",
    promise="an update is bitsandbytes' own, and what a checkpoint puts back goes on as if it had never stopped",
    tolerance="0: bit for bit",
    source="step/optimizer.py: masters in fp32; bitsandbytes' optimizers",
    run=run,
)
