"""How a run's steps are shared by its processes, as process 0 decides it: with `qlora/dealing.py`, by the state.

Cards of one kind share alike, and no clock is asked: the same run has the same bits. Where they differ, the first steps
go by the predicted speeds (`memory/multi_gpu.py`), some of them are measured, and the shares that follow stand from
then on. They are in the run's state, what was measured of them as well, so that a resumed run goes on as it would have.

Each card has settings of its own: one that runs out of memory takes smaller ones alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from qlora import device as hardware
from qlora.dealing import Cut, Shares, dealt, relative
from qlora.events import Notice, Recovered, Sink
from qlora.memory.multi_gpu import draws
from qlora.memory.plan import Plan
from qlora.model.weight_receiving import Place
from qlora.recipe.reading import Recipe
from qlora.training.answered import AnsweredBatches
from qlora.training.checkpoint import RunState
from qlora.training.memory_plan import MemorySettings
from qlora.training.step_batches import Pack, StepBatches

# The first step compiles kernels and fills the allocator; three more are enough to tell cards apart that differ by more
# than the packs of one step do: a share is a whole number of micro-batches.
FIRST_MEASURED, SETTLED_AFTER = 1, 4
clock = time.monotonic
Done = TypeVar("Done")


class Stopwatch:
    """`took`: microseconds until the device had done what was asked of it; 0 where nothing `measures`."""

    def __init__(self, device: torch.device, measures: bool) -> None:
        self.device, self.measures, self.took = device, measures, 0

    def during(self, work: Callable[[], Done]) -> Done:
        began = clock()
        done = work()
        if self.measures:
            hardware.synchronize(self.device)
            self.took = max(1, round(1e6 * (clock() - began)))
        return done


def following(
    cut: Callable[[RunState, Sequence[int], MemorySettings], Cut],
    batches: StepBatches | AnsweredBatches,
    state: RunState,
    settings: MemorySettings,
) -> tuple[tuple[Pack, ...], Cut]:
    """The packs of the step after the one that follows `state`, and its micro-batches."""
    packs = tuple(batches.order.packs_of_step(state.step + 1))
    return packs, cut(state, batches.lengths(packs), settings)


@dataclass
class Sharing:
    """Of the run that is under way. `others`: the settings of the other processes where cards differ, by number."""

    count: int
    recipe: Recipe
    sink: Sink
    first: Shares  # as predicted
    others: dict[int, MemorySettings] = field(default_factory=dict)
    measured: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # of the step under way: work and microseconds
    warm: bool = False  # a step was done in this process
    opened: bool = False

    @classmethod
    def of(cls, settings: MemorySettings, count: int, recipe: Recipe, sink: Sink) -> Sharing:
        """What memory allows each process, and how fast each is taken to be."""
        rows = settings.micro_batch_size
        if (cards := settings.cards) is None or not cards.differ:
            alike = Shares(rows=(rows,) * count, speeds=relative([1.0] * count), cards=("alike",) * count)
            return cls(count, recipe, sink, alike)
        plans = cards.estimators.by_card(cards.plans)
        others = {number: _with_plan(settings, plan) for number, plan in enumerate(plans) if number}
        shares = cards.whole(count).shares
        return cls(count, recipe, sink, shares.model_copy(update={"settled": False}), others)

    def settings(self, own: MemorySettings) -> list[MemorySettings]:
        """Of every process, where process 0 has its `own`."""
        return [self.others.get(number, own) for number in range(self.count)]

    def shares(self, state: RunState, own: MemorySettings) -> Shares:
        """As they stand after `state`, with what memory allows now."""
        known = self._known(state)
        if not self.opened:
            self._open(state, known)
        rows = tuple(one.micro_batch_size for one in self.settings(own))
        return known.model_copy(update={"rows": (min(rows),) * self.count if draws(self.recipe) else rows})

    def cut(self, state: RunState, lengths: Sequence[int], own: MemorySettings) -> Cut:
        return dealt(lengths, self.shares(state, own))

    def measures(self, state: RunState) -> bool:
        return self.warm and not self._known(state).settled and state.step >= FIRST_MEASURED

    def smaller(self, number: int, why: str, step: int) -> bool:
        """Make that process's settings smaller; False where all have the same, or nothing is left."""
        before = self.others.get(number)
        after = before and before.smaller()
        if before is None or after is None:
            return False
        rows = f"micro-batches of {after.micro_batch_size}" if before.micro_batch_size != after.micro_batch_size else ""
        change = rows or "more layers recomputed, or more of it on the host"
        self.others[number] = after
        self.sink.emit(Recovered(step, f"{why}: {change} there from now on; the same rows are done again"))
        return True

    def after_step(self, state: RunState, own: MemorySettings) -> RunState:
        """With the shares of the steps to come."""
        shares, found, self.measured, self.warm = self.shares(state, own), self.measured, None, True
        if found is not None and not shares.settled:
            work = _added(shares.work or (0,) * self.count, found[0])
            took = _added(shares.took or (0,) * self.count, found[1])
            shares = shares.model_copy(update={"work": work, "took": took})
        if not shares.settled and state.step >= SETTLED_AFTER and any(shares.took):
            shares = self._settled(shares, state.step)
        return replace(state, shares=shares)

    # ------------------------------------------------------------------------------------------------------------------

    def _known(self, state: RunState) -> Shares:
        found = state.shares
        if found is None and state.step > 0 and not self.others:
            return self.first.model_copy(update={"in_turn": True})  # of a version that dealt in turn
        return found if found is not None and found.cards == self.first.cards else self.first

    def _open(self, state: RunState, known: Shares) -> None:
        self.opened = True
        if state.shares is not None and known is not state.shares:
            before = len(state.shares.cards)
            message = f"shared by {self.count} processes from now on, by {before} before, whose shares hold no more"
            self.sink.emit(Notice("shares", message, self.count))
        elif state.shares is not None:  # what fitted goes on
            self.others = {
                number: replace(one, micro_batch_size=state.shares.rows[number]) for number, one in self.others.items()
            }

    def _settled(self, shares: Shares, step: int) -> Shares:
        """By what was measured; of a process that computed nothing, by what was predicted beside the others."""
        speeds = [done / taken if done and taken else 0.0 for done, taken in zip(shares.work, shares.took, strict=True)]
        known = [(one, was) for one, was in zip(speeds, shares.speeds, strict=True) if one]
        scale = sum(one for one, _ in known) / sum(was for _, was in known)
        found = relative([one or was * scale for one, was in zip(speeds, shares.speeds, strict=True)])
        lines = [
            f"process {number} ({card}) {speed / sum(found):.0%}, predicted {was / sum(shares.speeds):.0%}"
            for number, (card, speed, was) in enumerate(zip(shares.cards, found, shares.speeds, strict=True))
        ]
        message = f"of a step's tokens, as measured until step {step}: {'; '.join(lines)}"
        self.sink.emit(Notice("shares", message, self.count))
        return shares.model_copy(update={"speeds": found, "settled": True})


def _added(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(one + other for one, other in zip(left, right, strict=True))


def _with_plan(settings: MemorySettings, plan: Plan) -> MemorySettings:
    """What memory allows another card, by its plan."""
    train, memory = plan.recipe.train, plan.recipe.memory
    assert train.micro_batch_size != "auto" and train.gradient_checkpointing != "auto"
    return replace(
        settings,
        micro_batch_size=train.micro_batch_size,
        gradient_checkpointing=train.gradient_checkpointing,
        offload_activations=memory.offload_activations is True,
        place=Place.of(memory),
        plan=plan,
    )
