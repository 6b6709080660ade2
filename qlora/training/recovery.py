"""When memory runs out: leave the handler, free, take a smaller setting, and do the same work again.

The handler is left first: an exception keeps its frames, and with them every tensor of the failed step. What is redone
has the same rows and normalization: where dropout and NEFTune are 0, the same gradient. No report that memory ran out
(`qlora/out_of_memory.py`) ends the GPU's context; another error of a GPU may, and ends the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from qlora import heap
from qlora.device import release_memory
from qlora.errors import DoesNotFit
from qlora.events import Recovered, Sink
from qlora.guarded import Attempt
from qlora.memory.changes import changed
from qlora.memory.plan import does_not_fit
from qlora.training.memory_plan import MemorySettings
from qlora.units import layers_of

T = TypeVar("T")


@dataclass
class OomRecovery:
    """Does a run's work within what memory there is. `apply` gets all new settings before work is redone."""

    settings: MemorySettings
    device: torch.device
    sink: Sink
    apply: Callable[[MemorySettings], None]
    free: Callable[[], None] = lambda: None  # gives back what is made anew when it is needed

    def run(self, step: int, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """The result of `work`, done again with smaller settings until it fits; `undo` removes what a failed try left.

        Raises DoesNotFit when there is nothing left to make smaller.
        """
        return self._until_it_fits(step, work, undo, MemorySettings.smaller)

    def run_forward(self, step: int, work: Callable[[], T]) -> T:
        """Like `run`, for work without a backward pass, in which nothing is kept that could be computed again."""
        with heap.another_phase():
            return self._until_it_fits(step, work, lambda: None, MemorySettings.fewer_rows)

    def run_generation(self, step: int, work: Callable[[], T]) -> T:
        """Like `run`, for the generation of answers, which has a batch of its own."""
        with heap.another_phase():
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
            self.free()
            release_memory(self.device)
            if (settings := smaller(self.settings)) is None:
                raise self._nothing_left(reason)
            change = _describe(self.settings, settings)
            self.sink.emit(Recovered(step, f"{reason}: {change}; the same rows are done again"))
            self.settings = settings
            self.apply(settings)

    def _nothing_left(self, reason: str) -> DoesNotFit:
        plan, planner = self.settings.plan, self.settings.planner
        what = reason if self.settings.smaller() else f"{reason}, with one row at a time and layers recomputed"
        if planner is None or plan is None:
            return DoesNotFit(what, "lower data.max_length, then lora.r; or use a smaller base")
        now = {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
        return does_not_fit(planner, changed(plan.recipe, now), what)


def attempt(work: Callable[[], T]) -> tuple[tuple[T] | None, str]:
    """The result in a tuple, or None and why memory ran out. Returned after the handler is left."""
    with Attempt() as memory:
        return (work(),), ""
    return None, f"out of memory: {memory.reason}"


def _describe(before: MemorySettings, after: MemorySettings) -> str:
    if after.micro_batch_size != before.micro_batch_size:
        return f"micro-batches of {after.micro_batch_size} instead of {before.micro_batch_size} rows"
    if after.answers_at_once != before.answers_at_once:
        return f"{after.answers_at_once} instead of {before.answers_at_once} answers at once"
    if after.offload_activations != before.offload_activations:
        return "inputs of recomputed layers wait on the host from now on"
    if after.place != before.place:
        return f"{'layers' if after.place.streams else 'embeddings'} are on the host from now on"
    return f"the backward pass recomputes {layers_of(after.gradient_checkpointing)} from now on"
