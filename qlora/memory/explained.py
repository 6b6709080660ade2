"""Where the peak of a run stands, layer by layer, and what each change would save there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora.memory.changes import Changes, changed, toml_value
from qlora.memory.estimate import Estimate
from qlora.memory.layer_profile import Moment, moments
from qlora.memory.levers import LEVERS
from qlora.memory.plan import Plan, Planner
from qlora.recipe.reading import Recipe


@dataclass(frozen=True)
class Change:
    """Of the recipe, with what it saves (less than nothing: it takes more) and what is predicted with it."""

    changes: Changes
    saved_bytes: int
    estimate: Estimate


@dataclass(frozen=True)
class Explained:
    """`moments` in the order of a run, what no tensor shows included; the highest of them is the peak, unless merging
    takes more."""

    plan: Plan
    moments: Sequence[Moment]
    changes: Sequence[Change]

    @property
    def peak(self) -> int:
        """The place of the highest of `moments`."""
        return max(range(len(self.moments)), key=lambda at: self.moments[at].total)

    def as_dict(self) -> dict[str, Any]:
        return {
            "moments": [{"phase": one.phase, "layer": one.layer, "bytes": dict(one.parts)} for one in self.moments],
            "peak_at": self.peak,
            "changes": [
                {
                    "lines": [f"{key} = {toml_value(value)}" for key, value in one.changes.items()],
                    "saved_bytes": one.saved_bytes,
                    "fits": one.estimate.fits,
                    "tokens_per_second": round(one.estimate.tokens_per_second, 1),
                }
                for one in self.changes
            ],
        }


def explain(planner: Planner, plan: Plan) -> Explained:
    """Of a plan, whose "auto" keys are decided."""
    estimator, recipe, estimate = planner.estimator, plan.recipe, plan.estimate
    found = moments(*estimator.simulated(recipe, planner.facts))
    factor = estimator.correction.factor
    beside = {name: count for name, count in estimate.terms.items() if name not in ("context", "dequantized_weights")}
    more = {"workspace": sum(beside.values()), "context": estimate.terms["context"]}
    scaled = [replace(one, parts=_with(one.parts, factor, more)) for one in found]
    return Explained(plan, scaled, list(_changes(planner, recipe, estimate)))


def _with(parts: Mapping[str, int], factor: float, more: Mapping[str, int]) -> dict[str, int]:
    found = {name: round(count * factor) for name, count in parts.items()}
    return {**found, **{name: found.get(name, 0) + count for name, count in more.items()}}


def _changes(planner: Planner, recipe: Recipe, before: Estimate) -> Iterator[Change]:
    for changes in _single(recipe, planner):
        estimate = planner.ask(changed(recipe, changes))
        yield Change(changes, before.needed_bytes - estimate.needed_bytes, estimate)


def _single(recipe: Recipe, planner: Planner) -> Iterator[Changes]:
    """Each lever the other way, by itself; none that changes what is learned but shorter rows, the last resort."""
    train, on_card = recipe.train, planner.estimator.machine.device_type == "cuda"
    if train.gradient_checkpointing is not True:
        yield {"train.gradient_checkpointing": True}
    elif not any(getattr(recipe.memory, lever.key.partition(".")[2], None) is True for lever in LEVERS):
        yield {"train.gradient_checkpointing": False}
    for lever in LEVERS:
        key = lever.key.partition(".")[2]
        if on_card and key in type(recipe.memory).model_fields:
            taken = getattr(recipe.memory, key) == lever.on
            also = {} if taken else {"train.gradient_checkpointing": True}
            also = {} if lever.key == "memory.embedding" or train.gradient_checkpointing is True else also
            yield {**also, lever.key: lever.off if taken else lever.on}
    if train.micro_batch_size != 1 and train.micro_batch_size != "auto":
        yield {"train.micro_batch_size": train.micro_batch_size // 2}
    yield {"data.max_length": recipe.data.max_length // 2}
