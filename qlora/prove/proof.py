"""One promise of this program, and how it is tried: by a small function that measures and says what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlora import device as hardware
from qlora.prove.shapes import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Figure = float | int | str | bool | None


@dataclass(frozen=True)
class Place:
    """Where proofs run: the device, the shape of the large model, and a temporary folder that is removed at the end.

    `rows` x `length` is the micro-batch of the proofs that take real lengths.
    """

    device: torch.device
    shape: Shape
    folder: Path
    rows: int
    length: int

    @property
    def on_card(self) -> bool:
        return hardware.is_card(self.device)


@dataclass(frozen=True)
class Outcome:
    """What a proof found: `holds` is None where it does not apply on this machine; `said` is one line for people."""

    holds: bool | None
    said: str
    measured: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """`tolerance` is what is allowed between promised and measured, `source` where promise and tolerance come from."""

    name: str
    promise: str
    tolerance: str
    source: str
    run: Callable[[Place], Outcome]


def not_here(why: str) -> Outcome:
    return Outcome(None, why)


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """How far two lists of tensors are apart: 2-norm of the difference over the 2-norm of `theirs`."""
    apart = sum(float((one - other).double().square().sum()) for one, other in zip(ours, theirs, strict=True))
    size = sum(float(other.double().square().sum()) for other in theirs)
    return (apart / size) ** 0.5 if size else float("inf") if apart else 0.0


def all_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors have the same bits."""
    import torch

    pairs = list(zip(ours, theirs, strict=True))
    return all(one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu()) for one, other in pairs)
