"""Chat templates rendered out of this process: one long-lived worker, asked over pipes, ended when it misbehaves.

Bounds of one rendering: 2 seconds, 8 MiB of text, 1 GiB of memory (CVE-2025-61620: a sandboxed but unbounded template
takes a machine down). A worker that breaks one is killed, the row is an error, and the next row gets a new worker; a
template that does it OFFENCES times is given up. Requests travel in batches, which costs about 40 µs a rendering.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

from qlora import child_process
from qlora.data import render_worker
from qlora.data.row_json import RowError
from qlora.errors import TokenizerError

START_SECONDS = 60.0  # a cold disk and a busy machine; 0.1 s is usual
GRACE_SECONDS = 0.5  # for the pipe and a busy machine, on top of the template's own time
OFFENCES = 3
# JSON writes a character as at most six bytes (\u1234), and marks are short.
REPLY_BYTES = 6 * render_worker.OUTPUT_BYTES + (1 << 20)
_PIECE_BYTES = 1 << 20
_TEXT = itemgetter(0)  # of a request
# What Python needs to start, and the time zone. Nothing else of the environment: it may hold tokens.
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")


class Rendered(NamedTuple):
    """What a template made of a conversation; `marks` are the spans of characters in generation blocks."""

    text: str
    marks: list[tuple[int, int]]


class Request(NamedTuple):
    """A rendering to be asked for. `text`: what the worker reads of it; `part`: None for all messages, or how many of
    the first ones stand before an answer that a server is to give. Requests that share a text are sent as one."""

    text: str
    part: int | None = None

    def prompt(self, messages: int) -> Request:
        """The prompt that a server sends after so many messages."""
        return Request(self.text, messages)


class Renderer:
    """Renders `templates` by a worker of its own. `values` are given to every rendering.

    `ask_ahead` sends many requests at once, so that `render` finds them answered.
    """

    def __init__(self, templates: Sequence[str], values: Mapping[str, Any]) -> None:
        self._first_line = json.dumps({"templates": list(templates), "values": dict(values)}, default=_placeholder)
        self._worker: _Worker | None = None
        self.bounds: list[str] = []  # that were left by renderings asked alone, each ended by force
        self._asked: dict[Request, None] = {}  # in order, and not answered yet
        self._ahead: dict[Request, dict[str, Any]] = {}

    def ask_ahead(self, requests: Sequence[Request]) -> None:
        """Forget earlier answers and have these rendered (made by `request_of`). Does not wait for the answers."""
        self._collect()
        self._ahead = {}
        self._asked = dict.fromkeys(requests)
        if self._asked:
            worker = self._running()
            self._asked = dict.fromkeys(requests)  # a new process has not been asked anything
            worker.ask(self._asked)

    def render(self, request: Request) -> Rendered:
        """Raises RowError with the template's own message, or with the bound that it left."""
        if request in self._asked:
            self._collect(request)
        answer = self._ahead.get(request) or self._ask(request)
        if "bound" in answer:
            raise RowError(f"the chat template of the base was stopped: {answer['bound']}")
        if "error" in answer:
            raise RowError(f"the chat template refuses this conversation: {answer['error']}")
        return Rendered(answer["text"], [(start, end) for start, end in answer["marks"]])

    def _collect(self, until: Request | None = None) -> None:
        """Take the answers to what was asked ahead, up to the one to `until`.

        When a bound is left, the rest is not answered: each is then asked alone, which finds the one that did it.
        """
        while self._asked and (until is None or until not in self._ahead):
            worker = self._running()
            if not self._asked:  # it was asked of a worker that is gone
                return
            answer = worker.receive()
            if "bound" in answer:
                worker.end()
                self._asked.clear()
                return
            first = next(iter(self._asked))
            del self._asked[first]
            self._ahead[first] = answer

    def _ask(self, request: Request) -> dict[str, Any]:
        self._collect()
        worker = self._running()
        worker.ask([request])
        answer = worker.receive()
        if "bound" in answer:
            worker.end()
            self.bounds.append(answer["bound"])
            give_up(self.bounds)
        return answer

    def _running(self) -> _Worker:
        # After a fork the pipe belongs to the other process: two that talk on it would get each other's answers.
        if self._worker is None or self._worker.owner != os.getpid() or self._worker.ended:
            self._asked.clear()
            self._worker = _Worker()
            self._worker.send(self._first_line + "\n")
        return self._worker


def give_up(bounds: Sequence[str]) -> None:
    """Raise TokenizerError for a template that has been stopped OFFENCES times."""
    if len(bounds) >= OFFENCES:
        what = f"the base's chat template was stopped {OFFENCES} times: {bounds[OFFENCES - 1]}"
        hint = "do not trust this base; get the model from its original publisher, or use another one"
        raise TokenizerError(what, hint)


def request_of(template: int, values: Mapping[str, Any], written: Mapping[str, str] | None = None) -> Request:
    """A request of the number of the template, and the values it may use.

    `written`: values that are JSON already.
    """
    texts = {name: value_text(value) for name, value in values.items()} | dict(written or {})
    items = ", ".join([f'"{name}": {text}' for name, text in texts.items()])
    return Request(f"[{template}, {{{items}}}, ")


def value_text(value: Any) -> str:
    """A value as the worker reads it; what JSON does not know, as transformers gives it to a template."""
    return _ENCODER.encode(value)


def _placeholder(value: Any) -> str:
    return f"<{type(value).__name__}>"


_ENCODER = json.JSONEncoder(default=_placeholder)


class _Worker:
    """A running worker process, and a thread that reads what it answers (a pipe cannot be waited for on Windows)."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.ended = False
        self._last = ""
        self._rest = bytearray()  # of what was read: bytes after the last whole line
        self._lines: deque[bytes] = deque()
        command = [sys.executable, "-I", str(Path(render_worker.__file__)), json.dumps(child_process.import_path())]
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            what = f"no process could be started to render chat templates ({error.strerror or error})"
            raise TokenizerError(what, "close other programs, or raise the limit on processes (ulimit -u)") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests = self._process.stdin
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()
        weakref.finalize(self, _end, self._process, self._requests, self.owner)
        if self._next_line(START_SECONDS) != b"ready":
            self.end()
            what = "the process that renders chat templates does not start"
            raise TokenizerError(what, "check the installation of jinja2")

    def send(self, text: str) -> None:
        with suppress(OSError, ValueError):  # it has gone; `receive` says so
            self._requests.write(text.encode())
            self._requests.flush()

    def ask(self, requests: Iterable[Request]) -> None:
        """Have these rendered; the answers to what was asked before have all been received."""
        self._last = ""
        texts = (f"{text}{json.dumps([one.part for one in same])}]" for text, same in groupby(requests, _TEXT))
        self.send(f"[{','.join(texts)}]\n")

    def receive(self) -> dict[str, Any]:
        line = self._next_line(render_worker.SECONDS + GRACE_SECONDS)
        if line is None:
            return {"bound": f"it took more than {render_worker.SECONDS:.0f} seconds"}
        if not line:
            cut = len(self._rest) > REPLY_BYTES
            return {"bound": "it writes more than 8 MiB" if cut else "it ended the process that renders it"}
        answer: dict[str, Any] = json.loads(line.decode())
        if isinstance(text := answer.get("text"), int):
            answer["text"] = self._last[:text]  # a beginning of the last text that was written out
        elif text is not None:
            self._last = text
        return answer

    def end(self) -> None:
        self.ended = True
        _end(self._process, self._requests, self.owner)

    def _next_line(self, seconds: float) -> bytes | None:
        """A whole line; b"" when the worker has gone or writes without end; None when nothing came in time."""
        while not self._lines:
            try:
                piece = self._replies.get(timeout=seconds)
            except queue.Empty:
                return None
            self._rest += piece
            if b"\n" in piece:  # an answer of megabytes comes in many pieces, and is searched once
                *lines, rest = bytes(self._rest).split(b"\n")
                self._lines.extend(lines)
                self._rest = bytearray(rest)
            elif not piece or len(self._rest) > REPLY_BYTES:
                return b""
        return self._lines.popleft()


def _read(stream: IO[bytes], replies: queue.SimpleQueue[bytes]) -> None:
    """Bytes as they come; the last piece, when the worker has gone, is empty."""
    while piece := os.read(stream.fileno(), _PIECE_BYTES):
        replies.put(piece)
    replies.put(b"")


def _end(process: subprocess.Popen[bytes], requests: IO[bytes], owner: int) -> None:
    if owner != os.getpid():
        return  # a forked copy of us: the worker is not ours to end
    process.kill()
    process.wait()
    with suppress(OSError):  # what was still to be sent has nobody to read it
        requests.close()
