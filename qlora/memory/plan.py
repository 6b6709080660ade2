"""Settings that fit: the fastest micro-batch and checkpointing under a limit, and remedies where nothing fits.

A plan changes a recipe in as few keys as possible and is estimated by the simulation itself, never by a formula; a
formula (bytes grow by the same amount a row) only guesses where to look.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from qlora.errors import DoesNotFit
from qlora.memory.changes import Changes, changed, differences, halved, mildest, toml_value, value_of
from qlora.memory.estimate import DataFacts, Estimate, Estimator, batch_size_of
from qlora.memory.levers import EMBEDDING, LEVERS, SHARD, STREAM, free, with_what_levers_ask
from qlora.memory.search import LARGEST_MICRO_BATCH, Found, Search, reasons
from qlora.recipe.reading import Recipe
from qlora.units import gib

RESERVE_SHARE = 0.05  # of the limit, kept free by plans: what other programs take and what the estimate misses
MOST_PLANS = 3  # that a search shows
SHORTEST_LENGTH = 256  # what a search may cut rows to
SMALLEST_RANK = 4
SHORTEST_ANSWER = 64  # tokens, to which answers that are drawn may be cut


@dataclass(frozen=True)
class Plan:
    """A recipe with its "auto" keys decided and `changes` made, and what it will take."""

    recipe: Recipe
    changes: Changes
    estimate: Estimate
    reasons: Mapping[str, str] = field(default_factory=dict)  # of each key that was open, why it is what it is


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
                cut = ("longest", "prompt_tokens", "asked_tokens")
                facts = replace(facts, **{key: min(getattr(facts, key), most) for key in cut})
            self._known[key] = self.estimator.estimate(recipe, facts)
        return self._known[key]

    def decide(self, recipe: Recipe) -> Plan:
        """The "auto" keys as the fastest values that fit; as the smallest ones where nothing does."""
        search = self._search(recipe)
        found = search.fitting()
        return self._plan(recipe, search, found[0] if found else search.smallest())

    def search(self, recipe: Recipe) -> list[Plan]:
        """Plans that fit, the fastest first: of micro-batch, checkpointing and what may wait on the host, and only
        where those are not enough, of shorter rows, then of a smaller rank as well."""
        free = changed(recipe, {"train.micro_batch_size": "auto", "train.gradient_checkpointing": "auto"})
        as_long, *shorter = self._shorter(free)
        fitting = self._fitting(as_long) or mildest(shorter, self._fitting)
        found = [replace(plan, changes=differences(recipe, plan.recipe)) for plan in fitting or ()]
        return sorted(found, key=_speed, reverse=True)

    def _fitting(self, recipe: Recipe) -> list[Plan]:
        search = self._search(recipe)
        return [self._plan(recipe, search, found) for found in search.fitting(MOST_PLANS)]

    def _search(self, recipe: Recipe) -> Search:
        batch_size = batch_size_of(recipe, self.facts)
        most = LARGEST_MICRO_BATCH if batch_size is None else min(LARGEST_MICRO_BATCH, batch_size)
        open_levers = free(recipe, self.estimator.machine)
        return Search(self.ask, with_what_levers_ask(recipe), self.estimator.layers, open_levers, most)

    def _plan(self, asked: Recipe, search: Search, found: Found) -> Plan:
        return Plan(found.recipe, differences(asked, found.recipe), found.estimate, reasons(search, found))

    def _shorter(self, recipe: Recipe) -> Iterator[Recipe]:
        yield recipe
        for length in halved(recipe.data.max_length, SHORTEST_LENGTH):
            recipe = changed(recipe, {"data.max_length": length})
            yield recipe
        for rank in halved(recipe.lora.r, SMALLEST_RANK):
            yield changed(recipe, {"lora.r": rank})

    def remedies(self, recipe: Recipe, most: int = 3) -> list[Remedy]:
        """Up to `most` changes, the cheapest first, each of which is enough alone; else one that needs several keys.

        Cheap is what costs least of what is learned: smaller micro-batches and recomputing change nothing but time,
        shorter rows and smaller ranks do.
        """
        before = self.ask(recipe)
        enough: dict[str, Remedy] = {}  # by key: the mildest change of it that is enough
        alone: dict[str, Remedy] = {}  # by key: the change that saves most
        on_card = self.estimator.machine.device_type == "cuda"
        levers = list(_levers(recipe, on_card, max(SHORTEST_LENGTH, self.facts.typical if self.facts else 0)))

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


def choose(estimator: Estimator, recipe: Recipe, facts: DataFacts | None) -> Plan:
    """The plan of a run. Keeps a reserve for what it decides itself. Raises DoesNotFit, with remedies."""
    plan = decided(estimator, recipe, facts)
    if not plan.estimate.fits:
        raise does_not_fit(Planner(estimator, facts), plan.recipe)
    return plan


def decided(estimator: Estimator, recipe: Recipe, facts: DataFacts | None) -> Plan:
    """The "auto" keys as a run decides them: with a reserve, or as the smallest values where nothing leaves one."""
    changes: Changes = {}
    auto = "auto" in (recipe.train.micro_batch_size, recipe.train.gradient_checkpointing)
    if auto or free(recipe, estimator.machine):
        plan = Planner(with_reserve(estimator), facts).decide(recipe)
        if plan.estimate.fits:
            return plan
        recipe, changes = plan.recipe, plan.changes
    return Plan(recipe, changes, Planner(estimator, facts).ask(recipe))


def with_reserve(estimator: Estimator) -> Estimator:
    """The same one, with the same models on meta, for a machine with a part of its memory kept free."""
    reserved = copy.copy(estimator)
    machine = estimator.machine
    reserved.machine = replace(machine, limit_bytes=int(machine.limit_bytes * (1 - RESERVE_SHARE)))
    return reserved


def of_limit(plan: Plan, limit_bytes: int) -> Plan:
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
    if why is None and not estimate.fits_host:
        limit = estimate.host_limit_bytes or 0
        what = f"{gib(estimate.waiting_bytes)} are to wait in the host's memory, which has {gib(limit)} free"
        return DoesNotFit(what, "end other programs, or set memory.stream_weights = false and a smaller base")
    alone = estimate.components["weights"] + estimate.components["context"]
    movable = planner.estimator.machine.device_type == "cuda" and value_of(recipe, STREAM) is not True
    if recipe.quantization.type != "none" and alone > estimate.limit_bytes and not movable:
        return DoesNotFit(what, "nothing is enough with this base, its weights alone do not fit: use a smaller one")
    found = planner.remedies(recipe)
    if not found:
        return DoesNotFit(what, "a smaller base, or a higher memory.limit, is needed: no other setting saves anything")
    lead = "any one of these fits: " if len(found) > 1 else "this fits: "
    if not all(remedy.estimate.fits for remedy in found):
        lead = "nothing is enough with this base, use a smaller one; what saves most: "
    return DoesNotFit(what, lead + "; ".join(map(str, found)))


def _levers(recipe: Recipe, on_card: bool, shortest: int) -> Iterator[Changes]:
    """Changes from the cheapest to the dearest; later ones of a kind go further than earlier ones."""
    train = recipe.train
    if train.micro_batch_size != "auto":
        for rows in halved(train.micro_batch_size, 1):
            yield {"train.micro_batch_size": rows}
    if train.gradient_checkpointing is not True:
        yield {"train.gradient_checkpointing": True}
    for lever in LEVERS if on_card else ():
        if value_of(recipe, lever.key) != lever.on and lever.key != SHARD:  # which a plan has tried
            again = {} if lever.key == EMBEDDING else {"train.gradient_checkpointing": True}
            alone = {SHARD: False} if lever.key == STREAM and value_of(recipe, SHARD) is True else {}
            yield {lever.key: lever.on, **again, **alone}
    if train.optimizer in ("adamw", "paged_adamw_32bit"):
        yield {"train.optimizer": "paged_adamw_8bit"}
    if recipe.quantization.type == "none":
        yield {"quantization.type": "nf4"}
    if train.objective == "grpo":
        for length in halved(train.max_completion_length, SHORTEST_ANSWER):
            yield {"train.max_completion_length": length}
        shortest = max(shortest, train.max_completion_length + 1)  # a question has room beside its answer
    for length in halved(recipe.data.max_length, shortest):
        yield {"data.max_length": length}
    for rank in halved(recipe.lora.r, SMALLEST_RANK):
        yield {"lora.r": rank}


def _speed(plan: Plan) -> tuple[float, float, int]:
    """As predicted; without a GPU in the table (0.0), by not recomputing and then by larger micro-batches."""
    settings = plan.estimate.settings
    recomputes, rows = settings["train.gradient_checkpointing"], settings["train.micro_batch_size"]
    return plan.estimate.tokens_per_second, -float("inf") if recomputes is True else -recomputes, rows


def as_event(plan: Plan) -> dict[str, Any]:
    """What a plan event says about memory: plain values."""
    estimate = plan.estimate.as_dict()
    of_bytes = ("peak_bytes", "error_bytes", "limit_bytes", "host_peak_bytes", "disk_bytes")
    keys = (*of_bytes, "fits", "components", "phases", "settings", "notes")
    of_speed = {"tokens_per_second": estimate["tokens_per_second"], "reasons": dict(plan.reasons)}
    return {**{key: estimate[key] for key in keys}, **of_speed, "changes": dict(plan.changes)}
