"""Stages that may crash, tried in processes of their own, bounded in time: each answers, fails, hangs or dies alone."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from qlora import child_process, foreign_json, shown
from qlora.doctor.stages import Stage
from qlora.foreign_json import ForeignFileError

MAX_LINE_BYTES = 64 * 1024  # of an answer: one takes 300
LAST_LINES = 12  # of what a child prints, in which its reason is looked for
STARTING_SECONDS = 20.0  # of Python itself, on a machine that is busy


@dataclass(frozen=True)
class Trial:
    """What came of a stage: its answer, or None and why; `mend` where what failed said so itself.

    `needs` names the stage that failed before this one could be tried.
    """

    stage: str
    answer: Mapping[str, Any] | None = None
    failure: str = ""
    mend: str = ""
    needs: str = ""


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    lines: queue.Queue[bytes] = field(default_factory=queue.Queue)
    printed: deque[bytes] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    readers: list[threading.Thread] = field(default_factory=list)


def attempt(module: str, stages: Mapping[str, Stage], begin: Callable[[str], None] = lambda _: None) -> Iterator[Trial]:
    """Have `module` try these stages; `begin` is told before each. Behind one that dies a new process goes on."""
    waiting, failed = list(stages), set[str]()
    while waiting:
        for stage in waiting.copy():
            if missing := [need for need in stages[stage].needs if need in failed]:
                waiting.remove(stage)
                failed.add(stage)
                yield Trial(stage, needs=missing[0])
        for trial in _of_one_child(module, {name: stages[name] for name in waiting}, begin):
            waiting.remove(trial.stage)
            if trial.answer is None:
                failed.add(trial.stage)
            yield trial


def _of_one_child(module: str, stages: Mapping[str, Stage], begin: Callable[[str], None]) -> Iterator[Trial]:
    """Until it has answered all, or is gone: one stage at least."""
    extra = STARTING_SECONDS
    with child_process.life_line() as line:
        child: _Child | None = None
        try:
            for name, stage in stages.items():
                begin(name)
                try:
                    child = child or _start(child_process.command(module, *stages), line)
                except OSError as error:
                    yield Trial(name, failure=f"Python could not be started: {error.strerror or error}")
                    return
                trial = _next(child, name, stage.seconds + extra)
                extra = 0.0
                yield trial
                if trial.answer is None and child.process.poll() is not None:
                    return
        finally:
            if child is not None:
                _end(child)


def _start(command: Sequence[str], line: int) -> _Child:
    process = subprocess.Popen(
        command, stdin=line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    child = _Child(process)
    assert process.stdout is not None and process.stderr is not None
    for stream, keep in ((process.stdout, child.lines.put), (process.stderr, child.printed.append)):
        child.readers.append(threading.Thread(target=_read, args=(stream, keep), daemon=True))
        child.readers[-1].start()
    return child


def _read(stream: IO[bytes], keep: Callable[[bytes], None]) -> None:
    """Every line of a stream, then b"": its end."""
    with suppress(OSError, ValueError):
        while line := stream.readline(MAX_LINE_BYTES):
            keep(line)
    keep(b"")


def _next(child: _Child, stage: str, seconds: float) -> Trial:
    try:
        line = child.lines.get(timeout=seconds)
    except queue.Empty:
        _end(child)
        return Trial(stage, failure=f"it did not end within {seconds:.0f} seconds")
    if not line:
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(5)
        _end(child)
        for reader in child.readers:  # its last words may still be on their way
            reader.join(1)
        return Trial(stage, failure=death(child))
    try:
        value = foreign_json.parse_object(line, "the answer")
    except ForeignFileError:
        value = {}
    if value.get("stage") != stage:
        _end(child)
        return Trial(stage, failure="what it answered cannot be read")
    answer = value.get("answer")
    texts = {name: shown.one_line(str(value.get(name, "")))[:600] for name in ("failure", "mend", "needs")}
    return Trial(stage, answer if isinstance(answer, dict) else None, **texts)


def death(child: _Child) -> str:
    """How a child ended that gave no answer, with the last line that it printed."""
    code = child.process.returncode
    how = "it closed its output"
    if code is not None:
        end = child_process.how_it_ended(code)
        how = f"it crashed ({end})" if child_process.has_crashed(code) else f"it ended the process by {end}"
    printed = [text for one in child.printed if (text := " ".join(one.decode("utf-8", "replace").split()))]
    return f"{how}: {shown.one_line(printed[-1])[:200]}" if printed else how


def _end(child: _Child) -> None:
    """End the process with what it has started; one that hangs inside the kernel is left."""
    if child.process.poll() is None:
        with suppress(OSError):
            os.killpg(child.process.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.process.kill()
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(2)
