"""What several adapters of one base are to be combined by: weights, a method, and what the method needs.

linear           the sum of w · scale · B A, exactly: what peft calls cat
ties             trim, elect a sign, merge what agrees (Yadav et al. 2023), of the A's and of the B's as peft does
dare_linear      drop at random and rescale (Yu et al. 2023), then add; of the A's and of the B's
dare_ties        drop at random and rescale, then elect a sign and merge
magnitude_prune  keep the largest values, then add
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from qlora.errors import ExportError

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[str, ...] = get_args(Method)
DENSITY = 0.5  # of values that are kept; the papers find little lost at 0.2 to 0.5 of whole deltas
MOST = 64  # adapters: their ranks add up
_FARTHEST = 1000.0  # a weight beyond any use


@dataclass(frozen=True)
class Combination:
    """`weights` one an adapter, in their order; `density` the share of values that a method keeps, None its default;
    `seed` of what DARE draws."""

    weights: tuple[float, ...]
    method: str = "linear"
    density: float | None = None
    seed: int = 0

    @property
    def kept(self) -> float:
        """The share of values that is kept; 1 where nothing is dropped."""
        if self.method == "linear":
            return 1.0
        return DENSITY if self.density is None else self.density

    def check(self, adapters: int) -> None:
        """Raises ExportError where that many adapters cannot be combined so."""
        if self.method not in METHODS:
            raise ExportError(f"unknown method {self.method[:60]!r}", f"methods are {', '.join(METHODS)}")
        if not 2 <= adapters <= MOST:
            what = f"`weights` are for several adapters, and {adapters} is named"
            raise ExportError(what, f"name 2 to {MOST} runs or adapter folders, or leave `weights` out")
        if len(self.weights) != adapters:
            what = f"{adapters} adapters and {len(self.weights)} `weights`"
            raise ExportError(what, f"give one weight an adapter, such as {','.join(['0.5'] * min(adapters, 4))}")
        if odd := [weight for weight in self.weights if not math.isfinite(weight) or not 0 < abs(weight) <= _FARTHEST]:
            what = f"`weights`: {odd[0]:g} is no weight"
            raise ExportError(what, f"give numbers up to {_FARTHEST:g} other than 0; negative ones take away")
        if self.density is not None and self.method == "linear":
            raise ExportError("`density` is for methods that drop values, and linear keeps all", "leave it out")
        if not 0 < self.kept <= 1:
            raise ExportError(f"`density`: {self.kept:g} is no share", "give a number above 0, up to 1")


def parse_weights(text: str) -> tuple[float, ...]:
    """ "0.7,0.3" as numbers. Raises ExportError."""
    try:
        return tuple(float(part) for part in text[:10_000].split(","))
    except ValueError:
        raise ExportError(f"`weights`: {text[:60]!r} are no numbers", "write them like 0.7,0.3") from None
