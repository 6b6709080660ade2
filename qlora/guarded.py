"""What ends a piece of work that has no way round it: memory that ran out, a GPU that failed. Two lines, never a fault.

Work that can be done in smaller pieces is not done in here alone: `training/recovery.py` stands inside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from qlora import out_of_memory
from qlora.errors import DoesNotFit, QloraError, TrainingStopped, forget_frames


class Guarded:
    """`with Guarded("loading the base", hint):` memory that runs out inside is DoesNotFit, a GPU that fails is
    TrainingStopped. `saved` is asked then, and says what of the run is on the disk.

    Our own errors pass: whoever raised them knew more.
    """

    def __init__(self, doing: str, hint: str, saved: Callable[[], str] = lambda: "") -> None:
        self.doing = doing
        self.hint = hint
        self.saved = saved

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, QloraError):
            return
        if out_of_memory.is_out_of_memory(error):
            what = f"out of memory while {self.doing}: {out_of_memory.reason(error)}"
            raise DoesNotFit(what, self._with_saved(self.hint)) from error
        if (fault := out_of_memory.gpu_fault(error)) is not None:
            what = f"the GPU failed while {self.doing}: {fault[0]}"
            raise TrainingStopped(what, self._with_saved(fault[1])) from error

    def _with_saved(self, hint: str) -> str:
        saved = self.saved()
        return f"{hint}; {saved}" if saved else hint


class Attempt:
    """`with Attempt() as memory:` ends quietly where memory runs out inside; `memory.reason` says so behind it.

    The error is let go of, and with it every tensor of the calls that it came through.
    """

    reason = ""

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> bool:
        if error is None or isinstance(error, QloraError) or not out_of_memory.is_out_of_memory(error):
            return False
        self.reason = out_of_memory.reason(error)
        return True


@contextmanager
def guarded(doing: str, hint: str) -> Iterator[None]:
    """`Guarded`, behind which an error of ours holds on to no model."""
    handled = sys.exception()
    with Guarded(doing, hint):
        try:
            yield
        finally:
            forget_frames(sys.exception(), handled)
