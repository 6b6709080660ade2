"""A run's states are written by a thread while its steps go on; what is written, or fails, is said and counted here.

A save that fails costs nothing but itself: the last good checkpoint stands, training goes on, the next interval tries
again. After FAILURES in a row the run stops, since it would otherwise work for hours that nobody can get back. What has
no next time (the end of a run, a signal) fails at once.

The thread ends with its work. An interpreter that ends waits for it; a process that is killed takes it along, and the
folder that it was writing was not published yet.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from qlora.errors import TrainingStopped
from qlora.events import Recovered, Saved, Sink

# safetensors has an error of its own for a disk that is full, and it is no OSError.
WRITE_ERRORS = (OSError, SafetensorError)
FAILURES = 3


class Saving:
    """What of one run is on the disk: a state is begun, and settled before anything that needs it there.

    As a context it settles at the end, however that comes. `saved_step` is the newest state's, -1 before the first.
    """

    def __init__(self, run_dir: Path, sink: Sink) -> None:
        self.run_dir, self.sink = run_dir, sink
        self.saved_step = -1
        self.failures = 0
        self._writing: tuple[int, Future[Saved]] | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        with suppress(TrainingStopped):  # the run ends already
            self.settle()

    def begin(self, step: int, publish: Callable[[], Saved]) -> None:
        """Have a thread write the state of `step`. What was begun before must be settled."""
        assert self._writing is None
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qlora-saving")
        self._writing = step, thread.submit(publish)
        thread.shutdown(wait=False)

    def look(self) -> None:
        """Settle what has ended, and wait for nothing. Raises as `settle` does."""
        if self._writing is not None and self._writing[1].done():
            self.settle()

    def settle(self, last_chance: bool = False) -> None:
        """Wait for what is being written: it is saved now, and said to be; or it is an attempt that failed.

        Raises TrainingStopped as `attempt` does, and what the thread has raised beside WRITE_ERRORS.
        """
        if self._writing is None:
            return
        step, writing = self._writing

        def work() -> None:
            try:
                writing.result()
            finally:
                if writing.done():  # else a signal ended the waiting, and whoever waits next finds it
                    self._writing = None
            self.saved_step, self.failures = step, 0

        if self.attempt(f"the state of step {step}", work, step, last_chance):
            self.sink.emit(writing.result())  # whose own failure is none of the disk's

    def attempt(self, what: str, work: Callable[[], None], step: int, last_chance: bool) -> bool:
        """Do what writes to the disk; whether that went well. Raises TrainingStopped when it has failed too often."""
        try:
            work()
            return True
        except WRITE_ERRORS as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        self.failures += 1
        self.sink.emit(Recovered(step, f"{what} could not be saved: {why}; attempt {self.failures} of {FAILURES}"))
        if last_chance or self.failures >= FAILURES:
            newest = f"step {self.saved_step} is the last saved" if self.saved_step > 0 else "nothing is saved yet"
            raise TrainingStopped(
                f"{self.run_dir}: {what} could not be saved ({why}); {newest}",
                "free some space there, then go on with mode='resume'",
            )
        return False
