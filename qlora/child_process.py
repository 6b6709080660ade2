"""Python processes that we start: which code they may import, and that they end when we do. Nothing else starts one.

`python -m module` looks for modules in the current folder first: a `torch.py` or `random.py` that lies where the user
stands would be executed. So a child is isolated (`-I`: no current folder, no PYTHON… variables, no user's site) and is
then given our own import path, without the current folder unless this package itself lies there.

A child reads the end of a pipe whose other end only we hold: when we die, however we die, the system closes it, and the
child ends itself. Signals cannot do that (SIGKILL reaches one process), and only Linux has a parent-death signal.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_HOME = Path(__file__).resolve().parent.parent


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module as `__main__`, wherever the user stands."""
    return [sys.executable, "-I", str(Path(__file__).resolve()), json.dumps(import_path()), module, *arguments]


def import_path() -> list[str]:
    """Our own import path for a child: absolute, without the current folder, unless packages are installed there."""
    try:
        here = Path.cwd().resolve()
    except OSError:  # it has been removed
        here = None
    installed = {Path(place).resolve() for place in sysconfig.get_paths().values()} | {_HOME}
    entries = dict.fromkeys(os.path.abspath(entry) for entry in sys.path if os.path.isabs(entry))
    return [entry for entry in entries if (place := Path(entry).resolve()) in installed or place != here]


def limit_itself(limits: Mapping[str, int]) -> None:
    """In a child: what it gives up for good, by the names of `setrlimit` (AS and FSIZE in bytes). Windows has no such
    limits."""
    try:
        import resource
    except ImportError:
        return
    for name, value in limits.items():
        with suppress(ValueError, OSError, AttributeError):  # macOS knows no limit on address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def has_crashed(code: int) -> bool:
    """Whether a child was ended by a signal (a negative code), or as Windows ends one that crashes."""
    return code < 0 or code >= 0xC0000000  # NTSTATUS, severity error


def how_it_ended(code: int) -> str:
    """A child's exit code in words, a signal by its name."""
    if code < 0:
        return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"exit code {code:#x}" if has_crashed(code) else f"exit code {code}"


@contextmanager
def life_line() -> Iterator[int]:
    """A file descriptor for a child's stdin, through which it sees that we have gone."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def main() -> None:
    """In the child, of which this file is the script: watch the life line, then be the module that is asked for."""
    sys.path[:] = json.loads(sys.argv.pop(1))
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever written; the end of the file is the end of the parent
        pass
    os._exit(1)  # threads of native libraries may be at work: nothing is left to be tidied for


if __name__ == "__main__":
    main()
