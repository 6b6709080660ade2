"""When memory runs out: leave the handler, free, take a smaller setting, and do the same work again.

The handler is left first, because an exception keeps the frames it came through, and with them every tensor of the
failed step. What is redone has the same rows and the same normalization, so that the gradient is the same where dropout
and NEFTune are 0. Only torch's own out-of-memory error is met like this: after any other CUDA error the context may be
dead, and the run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from qlora.device import release_memory
from qlora.errors import DoesNotFit
from qlora.events import Recovered, Sink
from qlora.model.generate import ANSWERS_AT_ONCE
from qlora.training.checkpoint import RunState

if TYPE_CHECKING:
    from qlora.memory.plan import Plan, Planner

T = TypeVar("T")


@dataclass(frozen=True)
class MemorySettings:
    """The settings that decide about memory now, with the plan they come from (None where no estimate was possible)."""

    micro_batch_size: int
    gradient_checkpointing: bool
    answers_at_once: int = ANSWERS_AT_ONCE
    plan: Plan | None = None
    planner: Planner | None = None

    def smaller(self) -> MemorySettings | None:
        """The next smaller settings of a step: half the micro-batch, then recomputed layers; None at the end."""
        if self.micro_batch_size > 1:
            return replace(self, micro_batch_size=self.micro_batch_size // 2)
        if not self.gradient_checkpointing:
            return replace(self, gradient_checkpointing=True)
        return None

    def as_of(self, state: RunState) -> MemorySettings:
        """Go on with what fitted: the sizes of micro-batches are part of what makes a resumed run the same run."""
        if state.micro_batch_size is None or state.gradient_checkpointing is None:
            return self
        return replace(
            self, micro_batch_size=state.micro_batch_size, gradient_checkpointing=state.gradient_checkpointing
        )

    def fewer_answers(self) -> MemorySettings | None:
        return replace(self, answers_at_once=self.answers_at_once // 2) if self.answers_at_once > 1 else None


@dataclass
class OomRecovery:
    """Does a run's work within what memory there is. `changed` gets every new setting before work is redone."""

    fit: MemorySettings
    device: torch.device
    sink: Sink
    changed: Callable[[MemorySettings], None]

    def run(self, step: int, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """The result of `work`, done again with smaller settings until it fits; `undo` removes what a failed try left.

        Raises DoesNotFit when there is nothing left to make smaller.
        """
        return self._until_it_fits(step, work, undo, MemorySettings.smaller)

    def run_generation(self, step: int, work: Callable[[], T]) -> T:
        """Like `within`, for the generation of answers, which has a batch of its own."""
        return self._until_it_fits(step, work, lambda: None, MemorySettings.fewer_answers)

    def run_once(self, work: Callable[[], None]) -> None:
        """Work that cannot be done twice, such as an update: when memory runs out in it, the run ends."""
        done, reason = attempt(work)
        if done is None:
            raise self._nothing_left(f"{reason} (in the update; the last checkpoint is whole)")

    def _until_it_fits(
        self,
        step: int,
        work: Callable[[], T],
        undo: Callable[[], None],
        smaller: Callable[[MemorySettings], MemorySettings | None],
    ) -> T:
        while True:
            done, reason = attempt(work)
            if done is not None:
                return done[0]
            undo()
            release_memory(self.device)
            fit = smaller(self.fit)
            if fit is None:
                raise self._nothing_left(reason)
            self.sink.emit(Recovered(step, f"{reason}: {_told(self.fit, fit)}; the same rows are done again"))
            self.fit = fit
            self.changed(fit)

    def _nothing_left(self, reason: str) -> DoesNotFit:
        smallest = self.fit.smaller() is None
        what = f"{reason}, with one row at a time and layers recomputed" if smallest else reason
        if self.fit.planner is None or self.fit.plan is None:
            return DoesNotFit(what, "lower data.max_length, then lora.r; or use a smaller base")
        from qlora.memory.plan import changed, does_not_fit

        now = {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
        return does_not_fit(self.fit.planner, changed(self.fit.plan.recipe, now), what)


def attempt(work: Callable[[], T]) -> tuple[tuple[T] | None, str]:
    """The result in a tuple, or None and why memory ran out. Returned after the handler is left."""
    try:
        return (work(),), ""
    except torch.OutOfMemoryError as error:
        reason = "out of memory: " + (str(error).split(".")[1].strip() if "." in str(error) else str(error))
    return None, reason


def _told(before: MemorySettings, after: MemorySettings) -> str:
    if after.micro_batch_size != before.micro_batch_size:
        return f"micro-batches of {after.micro_batch_size} instead of {before.micro_batch_size} rows"
    if after.gradient_checkpointing != before.gradient_checkpointing:
        return "layers are recomputed in the backward pass from now on"
    return f"{after.answers_at_once} instead of {before.answers_at_once} answers at once"
