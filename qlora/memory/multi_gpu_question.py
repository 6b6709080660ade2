"""A question to the planner about several cards of one run: a recipe and cards, without rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qlora import processes
from qlora.errors import DoesNotFit
from qlora.memory import multi_gpu
from qlora.memory.changes import changed, toml_value, value_of
from qlora.memory.estimate import Estimator
from qlora.memory.hardware import Machine, RunCard
from qlora.memory.multi_gpu import SHARD, Estimators, MultiGpuPlan, batch_of, of_card
from qlora.memory.plan import Plan, Planner, does_not_fit, with_reserve
from qlora.memory.question import Question
from qlora.processes import Place
from qlora.recipe.reading import Recipe

LEARNED = ("data.max_length", "lora.r")  # what is the same on all cards, or another model is trained


@dataclass(frozen=True)
class MultiGpuChange:
    """The plan of all cards with the recipe's lines that it asks for, in which keys that each decides are "auto"."""

    whole: MultiGpuPlan
    changes: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        lines = [f"{key} = {toml_value(value)}" for key, value in self.changes.items()]
        return {"changes": self.changes, "lines": lines, **self.whole.as_dict()}


@dataclass(frozen=True)
class MultiGpuQuestion:
    """A recipe and the cards that it is to run on. `question` is about any of them alone."""

    question: Question
    cards: tuple[RunCard, ...]
    estimators: Estimators

    @classmethod
    def of(cls, question: Question, cards: Sequence[RunCard]) -> MultiGpuQuestion:
        one = question.estimator

        def make(machine: Machine) -> Estimator:
            made = Estimator(one.text, one.name, machine, one.baseline)
            made.asks = one.asks
            return made

        return cls(question, tuple(cards), Estimators(cards, make))

    def decided(self) -> MultiGpuPlan:
        """With "auto" keys decided as a run does."""
        recipe = self.question.recipe
        with self._simulating():
            return self.estimators.whole(self.estimators.decided(recipe, None), recipe, batch_of(recipe))

    def search(self) -> list[MultiGpuChange]:
        """Plans in which every card holds its part, the fastest first: where the recipe leaves it open, with the whole
        base on each card and with layers shared."""
        recipe, found = self.question.recipe, []
        known = SHARD.partition(".")[2] in type(recipe.memory).model_fields
        open_ = known and value_of(recipe, SHARD) == "auto"
        with self._simulating():
            for tried in [changed(recipe, {SHARD: way}) for way in (False, True)] if open_ else [recipe]:
                if (plan := self._found(tried)) is not None:
                    found.append(plan)
        return sorted(found, key=lambda plan: -plan.whole.tokens_per_second)

    def _found(self, recipe: Recipe) -> MultiGpuChange | None:
        estimators, shared = self.estimators, multi_gpu.as_shared(recipe, len(self.cards))
        best = [self._best(one, shared) for one in estimators.each]
        if shorter := self._least(recipe, best):
            shared = changed(shared, shorter)
            best = [self._best(one, shared) for one in estimators.each]
        if not all(best):
            return None
        plans = estimators.alike([plan for plan in best if plan is not None], shared, None)
        whole = estimators.whole(plans, changed(recipe, shorter), batch_of(recipe))
        return MultiGpuChange(whole, {**shorter, **self._changes(plans)}) if whole.fits else None

    def _best(self, estimator: Estimator, recipe: Recipe) -> Plan | None:
        plans = Planner(with_reserve(estimator)).search(recipe)
        return plans[0] if plans else None

    def _least(self, recipe: Recipe, plans: Sequence[Plan | None]) -> dict[str, Any]:
        """What all cards must learn, where one of them holds less."""
        known = [plan.recipe for plan in plans if plan is not None]
        found = {key: min(value_of(one, key) for one in known) for key in LEARNED if known}
        return {key: value for key, value in found.items() if value != value_of(recipe, key)}

    def _changes(self, plans: Sequence[Plan]) -> dict[str, Any]:
        recipe, changes = self.question.recipe, dict[str, Any]()
        for key in dict.fromkeys(key for plan in plans for key in plan.changes if key != "train.batch_size"):
            values = {repr(value_of(plan.recipe, key)): value_of(plan.recipe, key) for plan in plans}
            value = next(iter(values.values())) if len(values) == 1 else "auto"
            if value != value_of(recipe, key):
                changes[key] = value
        if SHARD.partition(".")[2] in type(recipe.memory).model_fields:
            value = any(value_of(plan.recipe, SHARD) is True for plan in plans)
            changes |= {SHARD: True} if value and value_of(recipe, SHARD) is not True else {}
        return changes

    def does_not_fit(self) -> DoesNotFit:
        """The error of the first card that cannot hold its part, with what to change."""
        estimators, recipe = self.estimators, self.question.recipe
        with self._simulating():
            plans = estimators.decided(recipe, None)
            missing = [
                (kind, one, plan)
                for kind, one, plan in zip(estimators.kinds, estimators.each, plans, strict=True)
                if not plan.estimate.fits
            ]
            kind, one, plan = missing[0]
            error = does_not_fit(Planner(one), plan.recipe)
        return of_card(error, self.cards, kind)

    @contextmanager
    def _simulating(self) -> Iterator[None]:
        count = len(self.cards)
        with self.question.simulating(), processes.taken(Place(0, count, 0, count)):
            yield
