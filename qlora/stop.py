"""How a run is asked to stop or to save: flags that it reads between micro-batches.

The command line installs the signal handlers; whoever calls the Python API may set the flags from a thread.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from qlora.errors import StoppedBySignal


class StopAsked(Exception):
    """Raised between micro-batches when a stop was asked for; the loop turns it into a saved state."""


class StopRequest:
    """Set once, by a signal handler or a caller; read by the run."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.is_read = False
        self._save_asked = False

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

    def ask_to_save(self) -> None:
        """The terminal is gone, or the machine may follow it: save at the next step, and go on."""
        self._save_asked = True

    def take_save_request(self) -> bool:
        asked, self._save_asked = self._save_asked, False
        return asked

    @property
    def is_set(self) -> bool:
        return self.signal_number is not None

    def check(self) -> None:
        """Raises StopAsked when it is time to leave what is being done. Called where leaving it loses nothing."""
        if self.is_set:
            raise StopAsked

    def error(self, done: str, hint: str) -> StoppedBySignal:
        number = self.signal_number or signal.SIGINT
        return StoppedBySignal(f"stopped by {signal.Signals(number).name}: {done}", hint, int(number))
