"""The parent's side of `worker.py`: a process for each reward that is somebody's code or schema, asked over pipes.

What it prints is kept aside and said once. One that hangs, ends or writes without end is killed, and told.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from qlora import child_process
from qlora.errors import RewardError
from qlora.rewards import worker
from qlora.shown import one_line

START_SECONDS = 120.0  # a function's file may import torch from a cold disk
MAX_REPLY_BYTES = 16 << 20  # a number takes up to 25 bytes, and a call has some thousands of answers
MAX_PRINTED = 4_000  # characters that are kept of what is printed
_PIECE_BYTES = 1 << 16


class RewardChild:
    """A running worker. `name` is how errors call the reward, `hint` what to do about what it raises."""

    def __init__(self, name: str, what: dict[str, Any], seconds: float, hint: str) -> None:
        """Raises RewardError where it does not start, or what it is to run cannot be opened."""
        self.name, self.seconds, self.hint = name, seconds, hint
        command = [sys.executable, "-I", str(Path(worker.__file__)), json.dumps(child_process.import_path())]
        # A group of its own: Ctrl-C is the run's, which ends its children when it has saved.
        group: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            group = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **group
            )
        except OSError as error:
            what_failed = f"no process could be started for the reward {name} ({error.strerror or error})"
            raise RewardError(what_failed, "close other programs, or raise the limit on processes") from error
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._requests = self._process.stdin
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._printed: list[str] = []
        self._listeners = [
            threading.Thread(target=_replied, args=(self._process.stdout, self._replies), daemon=True),
            threading.Thread(target=_kept, args=(self._process.stderr, self._printed), daemon=True),
        ]
        for thread in self._listeners:
            thread.start()
        with ExitStack() as stack:
            stack.callback(self.close)
            self._ask(what, max(seconds, START_SECONDS))
            stack.pop_all()

    def score(self, prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
        """Raises RewardError for a function that raises, hangs, ends its process, or gives what are no numbers."""
        scores: list[float] = self._ask([prompts, completions, rows], self.seconds)["scores"]
        return scores

    def printed(self) -> str:
        """What it has printed since it was asked last, on one line; "" for nothing."""
        said = "".join(self._printed)
        self._printed.clear()
        return one_line(" ".join(said[:MAX_PRINTED].split()))

    def close(self) -> None:
        """End the process, and what it started in its group."""
        if self._process.poll() is None:
            _kill(self._process)
        self._process.wait()
        with suppress(OSError):  # what was still to be sent has nobody to read it
            self._requests.close()
        for thread in self._listeners:
            thread.join(1.0)

    def _ask(self, request: Any, seconds: float) -> dict[str, Any]:
        with suppress(OSError, ValueError):  # it has gone: no reply will say so
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            self.close()
            what = f"the reward {self.name} took more than {seconds:g} seconds"
            raise RewardError(what, "make it faster, or raise train.reward_timeout") from None
        if not line.endswith(b"\n"):
            self.close()
            end = child_process.how_it_ended(self._process.returncode)
            why = f"writes more than {MAX_REPLY_BYTES >> 20} MiB" if line else f"ended its process ({end})"
            raise RewardError(f"the reward {self.name} {why}{self._last_words()}", self.hint)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            hint = 'pip install "qlora[rewards]"' if answer["error"] == worker.NOT_INSTALLED else self.hint
            raise RewardError(f"the reward {self.name} {answer['error']}", hint)
        return answer

    def _last_words(self) -> str:
        self._listeners[1].join(1.0)
        said = self.printed()
        return f": {said[-300:]}" if said else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        import signal

        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _replied(stream: IO[bytes], replies: queue.SimpleQueue[bytes]) -> None:
    """Lines as they come; the last, when the worker has gone, has no end."""
    with stream:
        while (line := stream.readline(MAX_REPLY_BYTES)).endswith(b"\n"):
            replies.put(line)
        replies.put(line)


def _kept(stream: IO[bytes], printed: list[str]) -> None:
    """The beginning of what is printed; the rest is read, so that nobody waits for it, and dropped."""
    with stream:
        while piece := os.read(stream.fileno(), _PIECE_BYTES):
            if sum(map(len, printed)) < MAX_PRINTED:
                printed.append(piece.decode(errors="replace")[:MAX_PRINTED])
