"""Copies between the host and a GPU that run beside computing, and in which order the two wait for each other.

On a GPU copies go to a stream of their own, which nothing else is asked of. It waits for what the computing stream was
asked to do so far, so that what is copied is there and where it is copied to is free; the computing stream waits for a
copy where it needs it. The host waits for none of them. Elsewhere a copy is done when it returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora import device as hardware


class CopyStream:
    """Of one device, for as long as somebody copies."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self._own: Any = hardware.accelerator.Stream(device) if hardware.is_card(device) else None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Inside, copies with `non_blocking` run beside what is computed from now on, behind what was computed."""
        if self._own is None:
            yield
            return
        self._own.wait_stream(hardware.accelerator.current_stream(self.device))
        with hardware.accelerator.stream(self._own):
            yield

    def mark(self) -> Any:
        """A point behind all copies that were asked for; None where they are done."""
        if self._own is None:
            return None
        event = hardware.accelerator.Event()
        event.record(self._own)
        return event

    def wait(self, mark: Any) -> None:
        """What is computed from now on comes behind that point."""
        if mark is not None:
            hardware.accelerator.current_stream(self.device).wait_event(mark)
