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
    def copying(self, after: Any = None) -> Iterator[None]:
        """Inside, copies with `non_blocking` run beside what is computed from now on, behind what was computed; with
        `after`, behind that point of it alone."""
        if self._own is None:
            yield
            return
        if after is None:
            self._own.wait_stream(hardware.accelerator.current_stream(self.device))
        else:
            self._own.wait_event(after)
        with hardware.accelerator.stream(self._own):
            yield

    def mark(self) -> Any:
        """A point behind all copies that were asked for; None where they are done."""
        return self._point(self._own)

    def computed(self) -> Any:
        """A point behind all that was asked of the device itself; None where it is done."""
        return self._point(None if self._own is None else hardware.accelerator.current_stream(self.device))

    def wait(self, mark: Any) -> None:
        """What is computed from now on comes behind that point."""
        if mark is not None:
            hardware.accelerator.current_stream(self.device).wait_event(mark)

    def _point(self, stream: Any) -> Any:
        if stream is None:
            return None
        event = hardware.accelerator.Event()
        event.record(stream)
        return event
