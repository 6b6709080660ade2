"""A call of the Python API in a notebook: it draws below its cell, and the interrupt button stops it as Ctrl-C does.

In a script nothing of this happens: there a call is silent without a `sink`, and signals are its caller's.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora import third_party
from qlora.events import Event, Notice, Sink, Sinks
from qlora.report.drawn import is_notebook
from qlora.stop import StopAsked, StopRequest

_AGAIN = "call it again; a run that has saved a step goes on with mode='resume'"


@contextmanager
def at_work(
    sink: Sink | None, stop: StopRequest | None = None, *, drawn: bool = True, results: bool = True
) -> Iterator[tuple[Sinks, StopRequest]]:
    """The sink behind the gate of all, and the request that stops the work.

    In a notebook, without a sink of the caller's, it is the notebook's (unless `drawn` is False; `results`: as
    `NotebookSink` has it), and an interrupt sets the request; without its being read, it ends the work at once. Of a
    stop, StoppedBySignal is raised.
    """
    request = stop or StopRequest()
    if not is_notebook():
        yield gate(sink), request
        return
    third_party.ask_for_no_widgets()
    screen = sink
    if sink is None and drawn:
        from qlora.report.notebook import NotebookSink

        screen = NotebookSink(results)
    shared = Sinks(_Asking(request), gate(screen))
    try:
        if stop is not None or _Interrupts.hold():  # its caller's, or that of the call that we are a part of
            yield shared, request
        elif threading.current_thread() is not threading.main_thread():
            what = "the work is in another thread, which no interrupt reaches: a StopRequest, given as `stop`, ends it"
            shared.emit(Notice("stop", what))
            yield shared, request
        else:
            with _Interrupts(request):
                yield shared, request
    finally:
        if screen is not None and screen is not sink:
            screen.close()


def gate(sink: Sink | None) -> Sinks:
    """The caller's sink, behind the gate of all: a screen of their own is one too."""
    return Sinks(sink) if sink is not None else Sinks()


class _Interrupts:
    """While it is open, the first SIGINT asks the work to stop, and a second one ends it at once.

    The kernel itself lives on: unlike a command's, its memory holds what else the notebook has made.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self._before: Any = None

    @staticmethod
    def hold() -> bool:
        """Whether one is open."""
        return isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), _Interrupts)

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        if isinstance(error, KeyboardInterrupt | StopAsked) and self.stop.is_set:
            raise self.stop.error("outside of training", _AGAIN) from None

    def _receive(self, number: int, _frame: Any) -> None:
        again = self.stop.is_set
        self.stop.set(number)
        if again or not self.stop.is_read:
            raise KeyboardInterrupt


class _Asking:
    """A sink that ends the work where a library has swallowed the interrupt."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def emit(self, event: Event) -> None:
        if self.stop.is_set and not self.stop.is_read:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Nothing is open."""
