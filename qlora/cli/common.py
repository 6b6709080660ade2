"""What every command shares: errors as two lines with an exit code, and signals as a request to stop."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import QloraError, RecipeError, StoppedBySignal

if TYPE_CHECKING:
    from qlora.training.stop import StopRequest

INTERNAL_ERROR = 1


def run(work: Callable[[], None]) -> None:
    """Do a command's work; whatever goes wrong becomes two lines on stderr and an exit code."""
    try:
        work()
    except RecipeError as error:
        for problem in error.problems:
            _say(f"{problem.where}: {problem.what}", problem.hint)
        sys.exit(error.exit_code)
    except QloraError as error:
        _say(error.what, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("stopped by SIGINT", "run it again; nothing that existed was changed")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1)
    except Exception as error:  # the one broad except: a fault of ours must not look like the user's
        _say(f"internal error: {type(error).__name__}: {error}", f"please report it with {_keep_traceback()}")
        sys.exit(INTERNAL_ERROR)


def _say(what: str, hint: str) -> None:
    """Two lines: what and where, what to do. Never rich's markup: a message may hold brackets."""
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    label = "\033[1;31merror\033[0m" if colour else "error"
    print(f"{label}: {what}\n       {hint}", file=sys.stderr)


def _keep_traceback() -> Path:
    from qlora.disk import cache_dir

    folder = cache_dir() / "crashes"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"crash-{os.getpid()}.txt"
    file.write_text(traceback.format_exc(), encoding="utf-8")
    return file


class Signals:
    """SIGINT and SIGTERM: the first one asks the run to stop, the second one ends the process at once.

    Where nobody reads the request (loading, tokenizing, exporting) there is no step to save: then the first signal ends
    the command by an exception, and half-written folders are swept on the way out.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if self.stop.is_set:
            os._exit(128 + number)
        self.stop.set(number)
        if not self.stop.is_read:
            name = signal.Signals(number).name
            raise StoppedBySignal(f"stopped by {name} outside of training", "--resume goes on from here", number)
