"""A card whose needs a hand can compute, in the place of a simulation."""

from __future__ import annotations

import json

from qlora.memory.estimate import DataFacts, Estimate
from qlora.memory.hardware import Machine
from qlora.memory.levers import LEVERS
from qlora.memory.plan import Planner
from qlora.recipe.reading import Recipe, recipe_of_base
from qlora.recipe.sections import MemorySection
from tests.memory.cases import GIB


class ByHand:
    """Stands in for the estimator: 2 GiB of weights, and for each token of a micro-batch 1 MiB, 4 without recomputing,
    which is faster."""

    def __init__(self, limit_gib: float, error_gib: float = 0) -> None:
        self.layers, self.name, self.error_bytes = 1, "by hand", int(error_gib * GIB)
        self.machine = Machine("cuda", int(limit_gib * GIB), "as given")

    def estimate(self, recipe: Recipe, facts: DataFacts | None = None) -> Estimate:
        rows = 1 if recipe.train.micro_batch_size == "auto" else recipe.train.micro_batch_size
        recomputes = recipe.train.gradient_checkpointing is not False
        length = facts.longest if facts else recipe.data.max_length
        peak = 2 * GIB + rows * length * (1 if recomputes else 4) * (1 << 20)
        settings = {"train.micro_batch_size": rows, "train.gradient_checkpointing": recomputes}
        weights = {"weights": 2 * GIB, "context": 0}
        speed = rows * (1.0 if recomputes else 1.5)
        return Estimate(
            peak, self.error_bytes, self.machine.limit_bytes, 0, 0, weights, {}, {}, peak, 0, speed, settings
        )


def planner(limit_gib: float, facts: DataFacts | None = None) -> Planner:
    return Planner(ByHand(limit_gib), facts)  # type: ignore[arg-type]


CLOSED = tuple(
    f"{lever.key}={json.dumps(lever.off)}"
    for lever in LEVERS
    if lever.key.partition(".")[2] in MemorySection.model_fields
)


def recipe(*settings: str) -> Recipe:
    """Nothing waits on the host."""
    return recipe_of_base("owner/name", ["data.max_length=1024", *CLOSED, *settings])


AUTO = ("train.micro_batch_size=auto", "train.gradient_checkpointing=auto")
