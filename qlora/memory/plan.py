"""Settings that fit: the fastest micro-batch and checkpointing under a limit, and remedies where nothing fits.

A plan changes a recipe in as few keys as possible and is estimated by the simulation itself, never by a formula; a
formula (bytes grow by the same amount a row) only guesses where to look.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from qlora.errors import DoesNotFit, ModelError, foreign_failures
from qlora.memory.estimate import DataFacts, Estimate, Estimator
from qlora.memory.hardware import Machine
from qlora.recipe.reading import Recipe
from qlora.units import gib

RESERVE_SHARE = 0.05  # of the limit, kept free by plans: what other programs take and what the estimate misses
LARGEST_MICRO_BATCH = 16
SHORTEST_LENGTH = 256  # what a search may cut rows to
SMALLEST_RANK = 4

Step = TypeVar("Step")
Found = TypeVar("Found")
Changes = Mapping[str, Any]  # "table.key" to the value that a recipe is changed to


@dataclass(frozen=True)
class Plan:
    """A recipe with its "auto" keys decided and `changes` made, and what it will take."""

    recipe: Recipe
    changes: Changes
    estimate: Estimate


@dataclass(frozen=True)
class Remedy:
    """A change that makes a recipe smaller: bytes it saves, and whether it is enough."""

    changes: Changes
    saved_bytes: int
    estimate: Estimate

    def __str__(self) -> str:
        lines = " and ".join(f"{key} = {toml_value(value)}" for key, value in self.changes.items())
        return f"{lines} (saves {gib(self.saved_bytes)})"


class Planner:
    """Asks an estimator, and keeps its answers."""

    def __init__(self, estimator: Estimator, facts: DataFacts | None = None) -> None:
        self.estimator = estimator
        self.facts = facts
        self._known: dict[str, Estimate] = {}

    def ask(self, recipe: Recipe) -> Estimate:
        key = recipe.model_dump_json(include={"model", "quantization", "lora", "data", "train", "eval", "memory"})
        if key not in self._known:
            facts, most = self.facts, recipe.data.max_length
            if facts is not None:  # rows are never longer than the recipe's limit, which a plan may lower
                facts = replace(facts, longest=min(facts.longest, most), prompt_tokens=min(facts.prompt_tokens, most))
            self._known[key] = self.estimator.estimate(recipe, facts)
        return self._known[key]

    def decide(self, recipe: Recipe) -> Plan:
        """The "auto" keys as the fastest values that fit; as the smallest ones where nothing does."""
        plans = self._plans(recipe)
        fitting = [plan for plan in plans if plan.estimate.fits]
        return max(fitting, key=_speed) if fitting else min(plans, key=lambda plan: plan.estimate.needed_bytes)

    def search(self, recipe: Recipe) -> list[Plan]:
        """Plans that fit, the fastest first: of micro-batch and checkpointing, and only where those are not enough, of
        shorter rows, then of a smaller rank as well."""
        free = changed(recipe, {"train.micro_batch_size": "auto", "train.gradient_checkpointing": "auto"})
        as_long, *shorter = self._shorter(free)
        fitting = self._fitting(as_long) or mildest(shorter, self._fitting)
        found = [replace(plan, changes=differences(recipe, plan.recipe)) for plan in fitting or ()]
        return sorted(found, key=_speed, reverse=True)

    def _fitting(self, recipe: Recipe) -> list[Plan]:
        return [plan for plan in self._plans(recipe) if plan.estimate.fits]

    def _shorter(self, recipe: Recipe) -> Iterator[Recipe]:
        yield recipe
        for length in _halved(recipe.data.max_length, SHORTEST_LENGTH):
            recipe = changed(recipe, {"data.max_length": length})
            yield recipe
        for rank in _halved(recipe.lora.r, SMALLEST_RANK):
            yield changed(recipe, {"lora.r": rank})

    def _plans(self, recipe: Recipe) -> list[Plan]:
        """Each value of checkpointing with the largest micro-batch that fits it, or with the smallest.

        Layers are recomputed where that is needed: with a given micro-batch, not where it fits without, and no more of
        them than it needs.
        """
        train = recipe.train
        # Whoever has inputs wait on the host, or weights come and go, has layers recomputed.
        moved = recipe.memory.offload_activations is True or recipe.memory.stream_weights is True
        free = (True,) if moved else (False, True)
        choices = free if train.gradient_checkpointing == "auto" else (train.gradient_checkpointing,)
        plans = []
        for recompute in choices:
            fixed = changed(recipe, {"train.gradient_checkpointing": recompute})
            best = self._largest_rows(fixed) if train.micro_batch_size == "auto" else fixed
            plans.append(Plan(best, differences(recipe, best), self.ask(best)))
            if train.micro_batch_size != "auto" and plans[-1].estimate.fits:
                break
        if len(plans) > 1 and (fewest := self._fewest_recomputed(recipe, plans[-1].recipe)):
            plans.append(fewest)
        return plans

    def _fewest_recomputed(self, asked: Recipe, all_layers: Recipe) -> Plan | None:
        """With as few layers recomputed as fit; None where no fewer than all do."""

        def fitting(count: int) -> Plan | None:
            recipe = changed(all_layers, {"train.gradient_checkpointing": count})
            plan = Plan(recipe, differences(asked, recipe), self.ask(recipe))
            return plan if plan.estimate.fits else None

        return mildest(range(1, self.estimator.layers), fitting)

    def _largest_rows(self, recipe: Recipe) -> Recipe:
        """The recipe with the largest micro-batch, a power of two, that fits; with 1 where none does."""
        batch_size = (self.facts.batch_size if self.facts else None) or recipe.train.batch_size
        most = LARGEST_MICRO_BATCH if batch_size == "auto" else min(LARGEST_MICRO_BATCH, batch_size)
        one = changed(recipe, {"train.micro_batch_size": 1})
        small = self.ask(one)
        if most == 1 or not small.fits:
            return one
        a_row = max(1, self.ask(changed(recipe, {"train.micro_batch_size": 2})).needed_bytes - small.needed_bytes)
        for rows in _halved(2 * LARGEST_MICRO_BATCH, 2):
            candidate = changed(recipe, {"train.micro_batch_size": rows})
            likely = rows <= most and small.needed_bytes + (rows - 1) * a_row <= small.limit_bytes
            if likely and self.ask(candidate).fits:
                return candidate
        return one

    def remedies(self, recipe: Recipe, most: int = 3) -> list[Remedy]:
        """Up to `most` changes, the cheapest first, each of which is enough alone; else one that needs several keys.

        Cheap is what costs least of what is learned: smaller micro-batches and recomputing change nothing but time,
        shorter rows and smaller ranks do.
        """
        before = self.ask(recipe)
        enough: dict[str, Remedy] = {}  # by key: the mildest change of it that is enough
        alone: dict[str, Remedy] = {}  # by key: the change that saves most
        levers = list(_levers(recipe, max(SHORTEST_LENGTH, self.facts.typical if self.facts else 0)))

        def fitting(changes: Changes) -> Remedy | None:
            remedy = self._remedy(recipe, changes, before)
            return remedy if remedy.estimate.fits and remedy.saved_bytes > 0 else None

        for key, of_key in groupby(levers, key=lambda changes: next(iter(changes))):
            if len(enough) < most:
                group = list(of_key)
                if found := mildest(group, fitting):
                    enough[key] = found
                elif (furthest := self._remedy(recipe, group[-1], before)).saved_bytes > 0:
                    alone[key] = furthest
        if enough:
            return list(enough.values())
        together: list[Changes] = []
        for changes in levers:
            together.append({**together[-1], **changes} if together else changes)
        if found := mildest(together, fitting):
            return [found]
        return sorted(alone.values(), key=lambda remedy: -remedy.saved_bytes)[:most]

    def _remedy(self, recipe: Recipe, changes: Changes, before: Estimate) -> Remedy:
        estimate = self.ask(changed(recipe, changes))
        return Remedy(dict(changes), before.needed_bytes - estimate.needed_bytes, estimate)


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
        with self._simulating():
            plan = _decided(self.estimator, changed(self.recipe, changes or {}), None)
        return _of_limit(plan, self.machine.limit_bytes).estimate

    def search(self) -> list[Plan]:
        """Plans that fit with the reserve that a run keeps for what it decides itself, the fastest first."""
        with self._simulating():
            plans = Planner(_with_reserve(self.estimator)).search(self.recipe)
        return [_of_limit(plan, self.machine.limit_bytes) for plan in plans]

    def does_not_fit(self) -> DoesNotFit:
        planner = Planner(self.estimator)
        with self._simulating():
            return does_not_fit(planner, planner.decide(self.recipe).recipe)

    @contextmanager
    def _simulating(self) -> Iterator[None]:
        """transformers' code runs here, on meta tensors and by a stranger's configuration."""
        with foreign_failures() as failure:
            yield
        if failure.error:
            what = f"{self.estimator.name}: config.json: a step of this model cannot be simulated ({failure.reason})"
            raise ModelError(
                what, "check config.json, or use another model: a run measures what it takes"
            ) from failure.error


def choose(estimator: Estimator, recipe: Recipe, facts: DataFacts | None) -> Plan:
    """The plan of a run. Keeps a reserve for what it decides itself. Raises DoesNotFit, with remedies."""
    plan = _decided(estimator, recipe, facts)
    if not plan.estimate.fits:
        raise does_not_fit(Planner(estimator, facts), plan.recipe)
    return plan


def _decided(estimator: Estimator, recipe: Recipe, facts: DataFacts | None) -> Plan:
    """The "auto" keys as a run decides them: with a reserve, or as the smallest values where nothing leaves one."""
    changes: Changes = {}
    if "auto" in (recipe.train.micro_batch_size, recipe.train.gradient_checkpointing):
        plan = Planner(_with_reserve(estimator), facts).decide(recipe)
        if plan.estimate.fits:
            return plan
        recipe, changes = plan.recipe, plan.changes
    return Plan(recipe, changes, Planner(estimator, facts).ask(recipe))


def _with_reserve(estimator: Estimator) -> Estimator:
    """The same one, with the same models on meta, for a machine with a part of its memory kept free."""
    reserved = copy.copy(estimator)
    machine = estimator.machine
    reserved.machine = replace(machine, limit_bytes=int(machine.limit_bytes * (1 - RESERVE_SHARE)))
    return reserved


def _of_limit(plan: Plan, limit_bytes: int) -> Plan:
    """With the whole limit, of which the plan left a reserve."""
    return replace(plan, estimate=replace(plan.estimate, limit_bytes=limit_bytes))


def does_not_fit(planner: Planner, recipe: Recipe, why: str | None = None) -> DoesNotFit:
    """The error for settings that need more than there is, with what to change and what that saves."""
    estimate = planner.ask(recipe)
    source = planner.estimator.machine.source
    margin = f" (a margin of {gib(estimate.error_bytes)} included)" if estimate.error_bytes else ""
    what = why or (
        f"needs {gib(estimate.needed_bytes)} of memory{margin}, the limit is {gib(estimate.limit_bytes)} ({source}); "
        f"{gib(estimate.components['weights'])} of it are the base's weights"
    )
    alone = estimate.components["weights"] + estimate.components["context"]
    if recipe.quantization.type != "none" and alone > estimate.limit_bytes:
        return DoesNotFit(what, "nothing is enough with this base, its weights alone do not fit: use a smaller one")
    found = planner.remedies(recipe)
    if not found:
        return DoesNotFit(what, "a smaller base, or a higher memory.limit, is needed: no other setting saves anything")
    lead = "any one of these fits: " if len(found) > 1 else "this fits: "
    if not all(remedy.estimate.fits for remedy in found):
        lead = "nothing is enough with this base, use a smaller one; what saves most: "
    return DoesNotFit(what, lead + "; ".join(map(str, found)))


def mildest(steps: Sequence[Step], fitting: Callable[[Step], Found | None]) -> Found | None:
    """What `fitting` finds at the first of the steps at which it finds anything; None where it does at none.

    Each step goes further than the one before it: what fits at one fits at every later one, so that halving the
    sequence asks the simulation 5 times for 16 steps.
    """
    if not steps or not (found := fitting(steps[-1])):
        return None
    least, first = 0, len(steps) - 1
    while least < first:
        middle = (least + first) // 2
        if nearer := fitting(steps[middle]):
            found, first = nearer, middle
        else:
            least = middle + 1
    return found


def _levers(recipe: Recipe, shortest: int) -> Iterator[Changes]:
    """Changes from the cheapest to the dearest; later ones of a kind go further than earlier ones."""
    train = recipe.train
    if train.micro_batch_size != "auto":
        for rows in _halved(train.micro_batch_size, 1):
            yield {"train.micro_batch_size": rows}
    if train.gradient_checkpointing is not True:
        yield {"train.gradient_checkpointing": True}
    if train.optimizer in ("adamw", "paged_adamw_32bit"):
        yield {"train.optimizer": "paged_adamw_8bit"}
    if recipe.quantization.type == "none":
        yield {"quantization.type": "nf4"}
    for length in _halved(recipe.data.max_length, shortest):
        yield {"data.max_length": length}
    for rank in _halved(recipe.lora.r, SMALLEST_RANK):
        yield {"lora.r": rank}


def _halved(value: int, smallest: int) -> Iterator[int]:
    """Half of it, half of that, and so on, as long as it is not below `smallest`."""
    while value // 2 >= smallest:
        value //= 2
        yield value


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with other values of some `table.key`s."""
    for name, value in changes.items():
        table, key = name.split(".")
        section = getattr(recipe, table)
        recipe = recipe.model_copy(update={table: section.model_copy(update={key: value})})
    return recipe


def differences(before: Recipe, after: Recipe) -> dict[str, Any]:
    """`table.key` to the new value, for every key that differs."""
    old, new = before.model_dump(), after.model_dump()
    return {
        f"{table}.{key}": new[table][key] for table in old for key in old[table] if old[table][key] != new[table][key]
    }


def toml_value(value: Any) -> str:
    """A value as a recipe writes it: what plans change looks the same in TOML and in JSON."""
    return json.dumps(value)


def _speed(plan: Plan) -> tuple[float, float, int]:
    """By the ideal speed; without a GPU in the table (0.0), by not recomputing and then by larger micro-batches."""
    settings = plan.estimate.settings
    recomputes, rows = settings["train.gradient_checkpointing"], settings["train.micro_batch_size"]
    return plan.estimate.tokens_per_second, -float("inf") if recomputes is True else -recomputes, rows
