"""A command on a pseudo-terminal or with streams of any kind, in a forked child that has everything imported."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from typing import IO, NoReturn

SECONDS = 120.0
# All that may steer a terminal: rich's colours, its live panel (up a line, erase it, hide and show the cursor).
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[hl]|\r|\n")
# What no text may hold (the tests of `qlora.shown` say which letters those are).
STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")

# One text that tries everything: title, screen, clipboard, colours in 8-bit form, a reversed line, rich's markup, lines
# of its own, Markdown and HTML.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;b3duZWQ=\x07\x9b31m\u202e\u200b[/bold][link=http://x]evil[/link]\x7f\x08\r"


def foreign_controls(output: bytes) -> list[str]:
    """What steers a terminal in the output and is not ours."""
    text = OURS.sub("", output.decode("utf-8", "surrogateescape"))
    return [
        repr(letter) for letter in text if unicodedata.category(letter) in STEERING and letter not in "\u200c\u200d"
    ]


def under_terminal(
    work: Callable[[], None], columns: int = 80, settings: Mapping[str, str | None] | None = None
) -> tuple[int, bytes]:
    """Exit code of `work` in a child, and all bytes that its terminal of `columns` got. `settings`: its environment."""
    pid, terminal = pty.fork()
    if pid == 0:
        _be(work, settings or {})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    output, end = b"", time.monotonic() + SECONDS
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                output += os.read(terminal, 1 << 16)
            except OSError:  # EIO: the child has closed its side
                break
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


def with_streams(
    work: Callable[[], None],
    streams: Mapping[int, str | None],
    settings: Mapping[str, str | None] | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """Exit code of `work` in a child whose file descriptors 0, 1, 2 are the files of `streams`, or closed (None).

    `before` is called in the child first (to become another user, say).
    """
    return os.waitstatus_to_exitcode(os.waitpid(begun(work, streams, settings, before), 0)[1])


def begun(
    work: Callable[[], None],
    streams: Mapping[int, str | None],
    settings: Mapping[str, str | None] | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """The number of such a child, which its caller waits for."""
    pid = os.fork()
    if pid == 0:
        for number, file in streams.items():
            if file is not None:
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | (os.O_APPEND if number else 0), 0o666), number)
        for number, file in streams.items():
            if file is None:
                os.close(number)
        if before is not None:
            before()
        _be(work, settings or {})
    return pid


def _be(work: Callable[[], None], settings: Mapping[str, str | None]) -> NoReturn:
    """In the child: be the process that Python would make of the command. As in Python, a closed stream is None."""
    code = 99
    try:
        for name in ("NO_COLOR", "TERM", "COLUMNS", "FORCE_COLOR"):
            os.environ.pop(name, None)
        for name, value in {"TERM": "xterm-256color", **settings}.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        warnings.resetwarnings()  # pytest makes errors of them
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        for handle, stream in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, stream, _opened(handle, *encoding.split(":")))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        for written in (sys.stdout, sys.stderr):
            try:
                written.flush()
            except (OSError, ValueError):
                code = 120  # as Python itself
        os._exit(code)


def _opened(handle: int, encoding: str, errors: str = "strict") -> IO[str] | None:
    try:
        os.fstat(handle)
    except OSError:
        return None
    return os.fdopen(handle, "w" if handle else "r", encoding=encoding, errors=errors, closefd=False)


def command(name: str, *arguments: str) -> Callable[[], None]:
    """The work of `qlora-NAME ARGUMENTS`."""

    def work() -> None:
        import importlib

        sys.argv = [f"qlora-{name}", *arguments]
        importlib.import_module(f"qlora.cli.{name}").app()

    return work
