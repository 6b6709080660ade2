"""How a run is asked to stop: a flag that the loop reads between micro-batches.

The command line installs the signal handlers; whoever calls the Python API may set the flag from a thread.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from qlora.errors import StoppedBySignal


class StopRequest:
    """Set once, by a signal handler or a caller; read by the run."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.is_read = False

    @contextmanager
    def being_read(self) -> Iterator[None]:
        """While a loop reads the flag, a signal handler may leave the stopping to it."""
        self.is_read = True
        try:
            yield
        finally:
            self.is_read = False

    def set(self, signal_number: int = signal.SIGINT) -> None:
        self.signal_number = signal_number

    @property
    def is_set(self) -> bool:
        return self.signal_number is not None

    def error(self, done: str, hint: str) -> StoppedBySignal:
        number = self.signal_number or signal.SIGINT
        return StoppedBySignal(f"stopped by {signal.Signals(number).name}: {done}", hint, int(number))
