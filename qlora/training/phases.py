"""Where a process's time went: seconds by phase, shown at the end of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qlora.events import Progress, Sink


class PhaseClock:
    """Adds up seconds by phase: load, rows, checks, evaluation, samples, training, saving. One phase runs at a time."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._since = time.monotonic()

    @contextmanager
    def phase(self, name: str, task: str = "") -> Iterator[None]:
        """The block's time counts as `name`, and not as the phase around it.

        `task` is drawn while the block runs: for work that may take over five seconds and emits no progress of its own.
        """
        outer = self._switch(name)
        if task:
            self.sink.emit(Progress(task, 0, 1))
        try:
            yield
        finally:
            self._switch(outer)
            if task:
                self.sink.emit(Progress(task, 1, 1))

    def _switch(self, to: str | None) -> str | None:
        now = time.monotonic()
        if self._phase is not None:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        before, self._phase, self._since = self._phase, to, now
        return before
