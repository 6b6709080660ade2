"""When a run saves, and what happens when it cannot.

A save that fails costs nothing but itself: the last good checkpoint stands, training goes on, the next interval tries
again. After FAILURES in a row the run stops, since it would otherwise work for hours that nobody can get back. What has
no next time (the end of a run, a signal) fails at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora import disk
from qlora.errors import RunFolderError, TrainingStopped
from qlora.events import Recovered, Sink
from qlora.recipe.sections import CheckpointSection
from qlora.step.optimizer import AdapterOptimizer
from qlora.stop import StopRequest
from qlora.training import checkpoint
from qlora.training.checkpoint import WRITE_ERRORS, Fingerprints, RunState, SaveFailed

FAILURES = 3
# The old one stays until the new one stands.
CHECKPOINTS_AT_ONCE = 2


class Checkpointer:
    """Saves one run's states into its folder, at the recipe's intervals and when asked to."""

    def __init__(self, run_dir: Path, section: CheckpointSection, sink: Sink, stop: StopRequest) -> None:
        self.run_dir = run_dir
        self.section = section
        self.sink = sink
        self.stop = stop
        self.saved_step = -1
        self.failures = 0
        self._tried_at = time.monotonic()

    def check_room(self, optimizer: AdapterOptimizer, adapter_bytes: int) -> None:
        """Whether two checkpoints and the delivered adapter fit on the disk. Raises RunFolderError."""
        if self.saved_step >= 0:
            return  # what is resumed has its place already
        needed = CHECKPOINTS_AT_ONCE * checkpoint.largest_bytes(optimizer) + 2 * adapter_bytes
        free = disk.free_bytes(self.run_dir)
        if free < needed:
            raise RunFolderError(
                f"{self.run_dir}: checkpoints and adapter need {needed / 2**20:.0f} MiB there, "
                f"{free / 2**20:.0f} MiB are free",
                "free some space, or name another disk in output.dir",
            )

    def is_due(self, step: int) -> bool:
        elapsed_minutes = (time.monotonic() - self._tried_at) / 60
        asked = self.stop.take_save_request()
        return asked or step % self.section.every_steps == 0 or elapsed_minutes >= self.section.every_minutes

    def save(
        self,
        state: RunState,
        optimizer: AdapterOptimizer,
        fingerprints: Fingerprints,
        about: Mapping[str, Any],
        last_chance: bool = False,
    ) -> None:
        """Save, unless this step is saved already. Raises TrainingStopped when it has failed too often."""
        if state.step in (self.saved_step, 0):
            return
        self._tried_at = time.monotonic()
        try:
            saved = checkpoint.save(self.run_dir, state, optimizer, fingerprints, self.section.keep, about)
        except SaveFailed as error:
            self._failed(f"the state of step {state.step}", str(error), state.step, last_chance)
        else:
            self.saved_step, self.failures = state.step, 0
            self.sink.emit(saved)

    def deliver(self, publish: Callable[[], None], step: int, last_chance: bool = False) -> bool:
        """Write the adapter's folder; whether it was written. Counts with the states: it is the same disk."""
        try:
            publish()
        except WRITE_ERRORS as error:
            self._failed(f"the adapter of step {step}", checkpoint.reason(error), step, last_chance)
            return False
        return True

    def _failed(self, what: str, why: str, step: int, last_chance: bool) -> None:
        self.failures += 1
        self.sink.emit(Recovered(step, f"{what} could not be saved: {why}; attempt {self.failures} of {FAILURES}"))
        if last_chance or self.failures >= FAILURES:
            newest = f"step {self.saved_step} is the last saved" if self.saved_step > 0 else "nothing is saved yet"
            raise TrainingStopped(
                f"{self.run_dir}: {what} could not be saved ({why}); {newest}",
                "free some space there, then go on with --resume",
            )
