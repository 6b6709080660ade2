"""Documents parsed out of this process: one worker for many files, and a fresh one after a file that ended it.

Bounds of one file: its size (`kinds.py`), 120 seconds of computing, 3 GiB of memory, 64 Mi characters of text.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from qlora import child_process
from qlora.data.documents import worker
from qlora.data.documents.blocks import Block
from qlora.data.documents.parsed import NotReadable, Parsed
from qlora.data.render import KEPT_VARIABLES
from qlora.errors import DataError

WALL_SECONDS = 1200.0  # for one file, by the clock: ten times its computing, on a busy machine
_REPLY_BYTES = 3 * worker.OUTPUT_BYTES  # JSON writes a quotation mark or a line break as two
_LEAVE_OUT = "make it anew from its source, or leave it out"


class Parser:
    """Reads files by a worker of its own, which is started when the first is asked for."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def parse(self, ending: str, data: bytes) -> Parsed:
        """A file's blocks. Raises NotReadable for what gives none, and DataError where no process can be started."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):  # it has gone; the answer that does not come says so
            process.stdin.write(json.dumps([ending, len(data)]).encode() + b"\n" + data)
            process.stdin.flush()
        line, late = _line(process, process.stdout)
        if not line.endswith(b"\n"):
            self.end()
            raise NotReadable(_why(process.returncode, late, len(line)), _LEAVE_OUT)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NotReadable(answer["error"], answer["hint"])
        blocks = [
            Block(kind, text, level, tuple(tuple(row) for row in rows)) for kind, text, level, rows in answer["blocks"]
        ]
        return Parsed(blocks, answer["pages"], tuple((what, count) for what, count in answer["left_out"]))

    def end(self) -> None:
        """End the worker, if there is one."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was still to be sent has nobody to read it
                pipe and pipe.close()
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        command = [sys.executable, "-I", str(worker.__file__), json.dumps(child_process.import_path())]
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            what = f"no process could be started to read documents ({error.strerror or error})"
            raise DataError(what, "close other programs, or raise the limit on processes (ulimit -u)") from error
        self._process = process
        assert process.stdout is not None
        if _line(process, process.stdout)[0] != b"ready\n":
            self.end()
            raise DataError("the process that reads documents does not start", "check the installation of qlora")
        return process


@contextmanager
def parser() -> Iterator[Parser]:
    """A parser whose worker ends with the block."""
    opened = Parser()
    try:
        yield opened
    finally:
        opened.end()


def _line(process: subprocess.Popen[bytes], stream: IO[bytes]) -> tuple[bytes, bool]:
    """The worker's next line, cut where it is too long, and whether the clock ran out. No line where it has gone."""
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(WALL_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        return stream.readline(_REPLY_BYTES), late.is_set()
    finally:
        timer.cancel()


def _why(code: int, late: bool, received: int) -> str:
    """What happened to a worker that gave no whole answer."""
    if late or code == -getattr(signal, "SIGPROF", 0):
        return f"it takes more than {worker.SECONDS} seconds to be read"
    if received >= _REPLY_BYTES:
        return "it becomes more text than a document may have"
    return f"it ended the process that reads it ({child_process.how_it_ended(code)})"
