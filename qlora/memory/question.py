"""A question to the planner: a recipe and a machine, without rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import DoesNotFit, ModelError, foreign_failures
from qlora.memory.changes import Changes, changed
from qlora.memory.estimate import Estimate, Estimator
from qlora.memory.explained import Explained, explain
from qlora.memory.hardware import Machine
from qlora.memory.plan import Plan, Planner, decided, does_not_fit, of_limit, with_reserve
from qlora.recipe.reading import Recipe


@dataclass(frozen=True)
class Question:
    """A recipe and the machine that it is to run on, without rows."""

    recipe: Recipe
    estimator: Estimator
    documents: Any = None  # of a recipe with some: what is known of them (`study/amount.py`)

    @property
    def machine(self) -> Machine:
        return self.estimator.machine

    @property
    def title(self) -> str:
        base = self.estimator.name
        name = "/".join(Path(base).parts[-2:]) if Path(base).is_absolute() else base  # as a hub name is: owner/name
        return f"{name}, rank {self.recipe.lora.r}, {self.recipe.train.optimizer}"

    def estimate(self, changes: Changes | None = None) -> Estimate:
        """With "auto" keys decided as a run does, and `changes` made first.

        Raises ModelError where it cannot be simulated.
        """
        return self.decided(changes).estimate

    def decided(self, changes: Changes | None = None) -> Plan:
        """As `estimate`: the recipe with its "auto" keys decided, and why they are what they are."""
        with self.simulating():
            plan = decided(self.estimator, changed(self.recipe, changes or {}), None)
        return of_limit(plan, self.machine.limit_bytes)

    def explain(self, plan: Plan) -> Explained:
        """Where the peak stands, of a plan that was found or as a run decides."""
        with self.simulating():
            return explain(Planner(self.estimator), plan)

    def search(self) -> list[Plan]:
        """Plans that fit with the reserve that a run keeps for what it decides itself, the fastest first."""
        with self.simulating():
            plans = Planner(with_reserve(self.estimator)).search(self.recipe)
        return [of_limit(plan, self.machine.limit_bytes) for plan in plans]

    def does_not_fit(self) -> DoesNotFit:
        planner = Planner(self.estimator)
        with self.simulating():
            return does_not_fit(planner, planner.decide(self.recipe).recipe)

    @contextmanager
    def simulating(self) -> Iterator[None]:
        """transformers' code runs here, on meta tensors and by a stranger's configuration."""
        with foreign_failures() as failure:
            yield
        if failure.error:
            what = f"{self.estimator.name}: config.json: a step of this model cannot be simulated ({failure.reason})"
            raise ModelError(
                what, "check config.json, or use another model: a run measures what it takes"
            ) from failure.error
