"""Cards whose needs a hand can compute, as fast as their table says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from qlora.memory.estimate import Estimate
from qlora.memory.hardware import Machine
from qlora.memory.simulation import ValueCounts
from qlora.recipe.reading import Recipe
from tests.memory.by_hand import ByHand


class HandCard(ByHand):
    """By hand, of a card whose speed is its table's."""

    asks = ()

    def __init__(self, machine: Machine) -> None:
        super().__init__(0)
        self.machine = machine

    def estimate(self, recipe: Recipe, facts: Any = None) -> Estimate:
        found = super().estimate(recipe, facts)
        rows, speed = found.settings["train.micro_batch_size"], self.machine.gpu.teraflops if self.machine.gpu else 0.0
        return replace(found, tokens_per_second=speed * (1 + rows / 100) * found.tokens_per_second / rows)

    def values(self, _recipe: Recipe) -> ValueCounts:
        return cast(ValueCounts, type("Values", (), {"adapter": 1000}))
