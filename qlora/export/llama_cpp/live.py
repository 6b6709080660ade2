"""A GGUF file held open in a child (`live_child.py`), to be asked for one token after the other."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from qlora import child_process, out_of_memory
from qlora.errors import DoesNotFit, ExportError
from qlora.export.llama_cpp import live_child
from qlora.export.llama_cpp.runtime import BYTE_TOKENS_PER_SECOND, START_SECONDS, find_runtime, threads
from qlora.export.llama_cpp.runtime_child import NO_MEMORY

TOKENS_AT_ONCE = 128  # of a row, computed in one request: between two, a stop is seen
_LINE_BYTES = 64 << 20  # of an answer: a vocabulary's marked tokens are the longest
_PIECE_BYTES = 1 << 20
_LOG_BYTES = 1 << 14
_HINT = "export it again, or get a clean copy of the file"
_MEMORY_HINT = "end other programs that hold memory, or use a smaller quant or context"


@contextmanager
def open_live(file: Path, context: int) -> Iterator[Live]:
    """The file, open for the time of the block. `context`: tokens of a row at most, the model's own length if that is
    less.

    Raises ExportError where there is no llama.cpp, or it says no, or it dies; DoesNotFit.
    """
    runtime = find_runtime()
    if runtime is None:
        what = f"{file}: llama.cpp is not installed, and a GGUF file is asked through it"
        raise ExportError(what, 'pip install "qlora[gguf]"')
    with tempfile.TemporaryFile(prefix="qlora-llama-") as log:
        live = Live(file, log)
        try:
            asked = {"library": str(runtime.library), "file": str(file), "context": context, "threads": threads()}
            live.begin(asked)
            yield live
        finally:
            live.close()


class Live:
    """The child, and what llama.cpp has understood of the file: `about` (see `live_child.Vocabulary.describe`).

    A child that has ended is started anew by what is asked next, and has forgotten the row.
    """

    def __init__(self, file: Path, log: IO[bytes]) -> None:
        self.file = file
        self.about: dict[str, Any] = {}
        self._log = log
        self._bytes = file.stat().st_size
        self._opening: dict[str, Any] = {}
        self._is_closed = False
        self._start()

    def _start(self) -> None:
        self._log.seek(0)
        self._log.truncate()  # the complaint of another child explains nothing
        command = [sys.executable, "-I", str(Path(live_child.__file__)), json.dumps(child_process.import_path())]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        except OSError as error:
            what = f"no process could be started for llama.cpp ({error.strerror or error})"
            raise ExportError(what, "close other programs, or raise the limit on processes (ulimit -u)") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests = self._process.stdin
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._rest = bytearray()
        self._is_silent = self._is_over = False
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()

    def begin(self, asked: dict[str, Any]) -> None:
        """Open the file. Raises as `open_live` does."""
        self._opening = asked
        self.about = self._open()

    def _open(self) -> dict[str, Any]:
        # A disk of 50 MB a second, the slowest that anyone would wait for.
        return self._asked(self._opening, START_SECONDS + self._bytes / 5e7)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it as such, nothing added around it."""
        ids: list[int] = self._ask({"text": text}, START_SECONDS)["ids"]
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; none of a control token."""
        return bytes.fromhex(self._ask({"piece": token}, START_SECONDS)["bytes"])

    def extend(self, ids: Sequence[int], start: int, wanted: bool) -> NDArray[np.float32] | None:
        """Compute `ids` (TOKENS_AT_ONCE at most) at places `start`, … of the row: the logits (V,) after the last one
        where they are `wanted`, else an empty array. None where llama.cpp cannot go on from there, and has forgotten
        all of the row.
        """
        seconds = START_SECONDS + len(ids) * self._bytes / BYTE_TOKENS_PER_SECOND
        answer = self._ask({"ids": list(ids), "start": start, "wanted": wanted}, seconds)
        if "lost" in answer:
            return None
        return np.frombuffer(self._take(int(answer["logits"]), seconds), dtype=np.float32)

    def close(self) -> None:
        """End the child, for good."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # what was still to be sent has nobody to read it
            self._requests.close()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if (self._is_over or self._process.poll() is not None) and not self._is_closed:
            self._end()
            self._start()
            if self._open() != self.about:
                self._is_over = True  # what it says of its tokens is not what was read of them
                raise ExportError(f"{self.file}: is another file than the one that was opened", "open it again")
        return self._asked(request, seconds)

    def _asked(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        # Until all of the answer is here: where an interrupt ends the waiting, the next to ask would be given it.
        self._is_over = True
        with suppress(OSError, ValueError):  # it has gone: no answer says so
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        until = time.monotonic() + seconds
        while (end := self._rest.find(b"\n")) < 0 and len(self._rest) < _LINE_BYTES:
            self._more(until)
        if end < 0:
            raise ExportError(f"{self.file}: llama.cpp says more of it than {_LINE_BYTES:,} bytes", _HINT)
        answer: dict[str, Any] = json.loads(bytes(self._rest[:end]))
        del self._rest[: end + 1]
        # With a failure the child ends; behind logits' line come their bytes.
        self._is_over = "failed" in answer or "logits" in answer
        if NO_MEMORY in answer.get("failed", ""):
            raise DoesNotFit(f"{self.file}: {answer['failed']}", _MEMORY_HINT)
        if "failed" in answer:
            raise ExportError(f"{self.file}: {self._with_complaint(answer['failed'])}", _HINT)
        return answer

    def _take(self, count: int, seconds: float) -> bytes:
        """The raw bytes behind an answer."""
        until = time.monotonic() + seconds
        while len(self._rest) < count:
            self._more(until)
        raw = bytes(self._rest[:count])
        del self._rest[:count]
        self._is_over = False
        return raw

    def _more(self, until: float) -> None:
        """Wait for what the child writes next. Raises for one that has died, or is silent for too long."""
        try:
            piece = self._replies.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            self._is_silent = True  # a late answer would be taken for that to the next question
            self._process.kill()
            raise self._death() from None
        if not piece:
            self._replies.put(b"")  # who asks next is told as well
            raise self._death()
        self._rest += piece

    def _death(self) -> ExportError | DoesNotFit:
        self._is_over = True
        code = self._process.wait()
        if self._is_silent:
            what = f"{self.file}: llama.cpp did not answer in time"
            return ExportError(what, "end other programs, or use a smaller quant")
        lines = self._log_lines()
        if code == -9 or any(map(out_of_memory.is_report, lines[-12:])):
            what = f"{self.file}: out of memory while llama.cpp read or computed it"
            return DoesNotFit(what, _MEMORY_HINT)
        how = child_process.how_it_ended(code)
        return ExportError(f"{self.file}: {self._with_complaint('llama.cpp crashed')} ({how})", _HINT)

    def _with_complaint(self, reason: str) -> str:
        """The reason, with the last line in which llama.cpp complains."""
        words = ("error", "assert", "invalid", "unknown", "fail")
        found = [line for line in self._log_lines() if any(word in line.lower() for word in words)]
        return f"{reason}: {found[-1][:300]}" if found else reason

    def _log_lines(self) -> list[str]:
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - _LOG_BYTES))
        return [" ".join(line.split()) for line in self._log.read().decode("utf-8", "replace").splitlines()]


def _read(stream: IO[bytes], replies: queue.SimpleQueue[bytes]) -> None:
    """Bytes as they come; the last piece, when the child has gone, is empty."""
    with suppress(OSError, ValueError):
        while piece := os.read(stream.fileno(), _PIECE_BYTES):
            replies.put(piece)
    replies.put(b"")
