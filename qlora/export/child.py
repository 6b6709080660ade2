"""A module of the package run in a process of its own, because a broken file may take down the process that reads it.

Request and answer are JSON files in a folder that parent and child share; everything that the child prints is the log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import child_process, out_of_memory

_REQUEST, _ANSWER, _LOG = "request.json", "answer.json", "log.txt"
_LOG_BYTES = 1 << 16  # of the log's end, in which an error is looked for
_LINE_CHARACTERS = 300
_REPORT_LINES = 12  # torch explains an error of CUDA in six lines


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its answer ({} without one), its exit code (None: it was ended after its time), its log."""

    answer: Mapping[str, Any]
    code: int | None
    log: tuple[str, ...]

    @property
    def ran_out_of_memory(self) -> bool:
        """By what it said last; or by its end: with SIGKILL the system ends the process that takes most."""
        killed = self.code == -getattr(signal, "SIGKILL", 9)
        return killed or any(map(out_of_memory.is_report, self.log[-_REPORT_LINES:]))

    def last_line(self, *words: str) -> str:
        """The log's last line, of those that hold one of `words` where there are any; "" without one."""
        lines = [line for line in self.log if not words or any(word in line.lower() for word in words)]
        return lines[-1][:_LINE_CHARACTERS] if lines else ""


def run(module: str, request: Mapping[str, Any], folder: Path, seconds: float) -> Outcome:
    """Have `module` answer a request (JSON, any sequence as a list), in `folder`, for `seconds` at most."""
    file = folder / _REQUEST
    file.write_text(json.dumps(request, default=list), encoding="utf-8")
    command = child_process.command(module, str(file))
    code = None
    with (folder / _LOG).open("wb") as log, child_process.life_line() as line, suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, stdin=line, stdout=log, stderr=log, timeout=seconds, check=False)
        code = done.returncode
    with (folder / _LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
        text = log.read().decode("utf-8", "replace")
    answer = {}
    with suppress(OSError, ValueError):  # there is none, or half of one: the child died over it
        answer = json.loads((folder / _ANSWER).read_text(encoding="utf-8"))
    return Outcome(
        answer=answer,
        code=code,
        log=tuple(" ".join(line.split()) for line in text.strip().splitlines()),
    )


def read_request(file: Path) -> dict[str, Any]:
    """In the child: what it is asked, in the file that its command line names."""
    request: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return request


def write_answer(request_file: Path, answer: Mapping[str, Any]) -> None:
    """In the child: its answer, beside the request."""
    (request_file.parent / _ANSWER).write_text(json.dumps(answer), encoding="utf-8")
