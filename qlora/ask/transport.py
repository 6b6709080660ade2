"""HTTP on this machine alone: bounded in bytes, seconds and connections, and out of reach of every web page.

A page that a browser shows can send requests to 127.0.0.1. It cannot hide that it does so: a browser says so in
`Origin` and `Sec-Fetch-Site`, and a name that was made to mean 127.0.0.1 (DNS rebinding) stands in `Host`. No page has
business here, so that whatever says it comes from one is refused, and no header invites it (no CORS).
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qlora.ask.requests import RequestError
from qlora.errors import QloraError, UserError, foreign_failures

HOST = "127.0.0.1"
HEADER_BYTES = 32 << 10  # of one request's first line and headers
IDLE_SECONDS = 30.0  # for the next request of a connection to come, headers and all
BODY_SECONDS = 30.0
WRITE_SECONDS = 30.0  # for a client to take all of an answer, what it takes at once not counted
MAX_CONNECTIONS = 64
MAX_LENGTH_DIGITS = 20
_LOOK_SECONDS = 0.2


class TooMuch(Exception):
    """A request that is larger than it may be."""


class Gone(Exception):
    """The client went away, or the server is ending."""


class _Reader(io.RawIOBase):
    """A socket, read for so many bytes and so long as `allow` says."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._left, self._until = 0, 0.0

    def allow(self, count: int, seconds: float) -> None:
        self._left, self._until = count, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._left <= 0:
            raise TooMuch
        self._connection.settimeout(max(0.001, self._until - time.monotonic()))
        count = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= count
        return count


class _Writer(io.BufferedIOBase):
    """A socket, written to for so long as `allow` says, in all: what is taken at once costs next to nothing of that,
    and a client that takes a few bytes at a time cannot hold up those who wait for longer than one that takes none.

    Raises Gone.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._left = 0.0

    def allow(self, seconds: float) -> None:
        self._left = seconds

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        began = time.monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError
            self._connection.settimeout(self._left)
            self._connection.sendall(data)
        except OSError as error:
            raise Gone from error
        self._left -= time.monotonic() - began
        return memoryview(data).nbytes


class Handler(BaseHTTPRequestHandler):
    """One connection: requests after each other, answered by `server.answer`."""

    server: LocalServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qlora", ""
    requestline, request_version, command = "", "", ""  # until there is a first line: one too long is answered as well
    _closes = True
    _has_begun = _is_events = False

    def setup(self) -> None:
        super().setup()
        self._reader = _Reader(self.connection)
        self.rfile = io.BufferedReader(self._reader)
        self._writer = _Writer(self.connection)
        self.wfile = self._writer

    def handle_one_request(self) -> None:
        self._has_begun = self._is_events = False
        self._reader.allow(HEADER_BYTES, IDLE_SECONDS)
        self._writer.allow(WRITE_SECONDS)
        try:
            self.raw_requestline = self.rfile.readline(HEADER_BYTES + 1)
            if not self.raw_requestline:
                self.close_connection = True
            elif self.parse_request():  # which answers what is no request
                self._checked_answer()
        except TooMuch:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too large")
        except (OSError, Gone):
            self.close_connection = True

    def body(self, max_bytes: int) -> bytes:
        """The request's JSON. Raises RequestError."""
        lengths = self.headers.get_all("Content-Length") or []
        is_said = len(lengths) == 1 and lengths[0].isascii() and lengths[0].isdigit()
        if not is_said or "Transfer-Encoding" in self.headers:
            raise self._last(RequestError("the length of the body is not said (Content-Length)", status=411))
        kind = self.headers.get_content_type()
        if kind != "application/json":
            raise self._last(RequestError(f"the body is {kind[:80]}, not application/json", status=415))
        if len(lengths[0]) > MAX_LENGTH_DIGITS or (count := int(lengths[0])) > max_bytes:
            raise self._last(RequestError(f"the body has more than {max_bytes:,} bytes", status=413))
        self._reader.allow(count, BODY_SECONDS)
        try:
            data = self.rfile.read(count)
        except TimeoutError:
            raise self._last(RequestError("the body did not come in time", status=408)) from None
        except OSError as error:
            raise Gone from error
        if len(data) < count:
            raise Gone
        self.close_connection = self._closes  # nothing of it is left to be taken for the next request
        return data

    def send_json(self, status: int, value: Any, headers: Mapping[str, str] = {}) -> None:
        """A whole answer."""
        data = json.dumps(value).encode()
        self._begin(status, "application/json", {**headers, "Content-Length": str(len(data))})
        self.wfile.write(data)

    def begin_events(self, headers: Mapping[str, str]) -> None:
        """Begin an answer of server-sent events, which ends with the connection."""
        self.close_connection = self._is_events = True
        self._begin(HTTPStatus.OK, "text/event-stream; charset=utf-8", headers)

    def send_event(self, text: str) -> None:
        """One event, of one line."""
        self.wfile.write(f"data: {text}\n\n".encode())

    def is_gone(self) -> bool:
        """Whether the client has closed the connection, or the server is ending."""
        if self.server.is_ending:
            return True
        try:
            self.connection.setblocking(False)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            with suppress(OSError):
                self.connection.settimeout(WRITE_SECONDS)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, in the protocol's shape."""
        self.close_connection = True
        with suppress(Gone):
            self.send_json(code, RequestError(message or HTTPStatus(code).phrase, status=code).body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was answered is a notice of the server's."""

    def _checked_answer(self) -> None:
        self._closes = self.close_connection
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # unless the body is read
        failed: BaseException | None
        try:
            with foreign_failures(memory_too=True) as failure:  # whatever it is, the server goes on
                self._refuse_pages()
                self.server.answer(self)
            failed = failure.error
        except QloraError as error:
            failed = error
        if isinstance(failed, RequestError):
            self._refuse(failed)
        elif isinstance(failed, Gone | TooMuch):
            raise failed
        elif failed is not None:
            self.close_connection = True
            self._refuse(self.server.report_fault(failed))

    def _refuse(self, error: RequestError) -> None:
        """Say why there is no answer, or no more of it: its status is gone where it has begun."""
        if self._is_events:
            self.send_event(json.dumps(error.body))
        elif self._has_begun:
            raise Gone
        else:
            self.send_json(error.status, error.body)

    def _refuse_pages(self) -> None:
        hosts = [host.lower().strip() for host in self.headers.get_all("Host") or []]
        if len(hosts) != 1 or hosts[0] not in self.server.names:
            what = f"Host must be {self.server.names[0]}: this server answers programs on this machine"
            raise self._last(RequestError(what, code="host_refused", status=403))
        site = self.headers.get("Sec-Fetch-Site", "none")
        if "Origin" in self.headers or site not in ("none", "same-origin"):
            raise self._last(RequestError("web pages are not answered", code="origin_refused", status=403))

    def _last(self, error: RequestError) -> RequestError:
        """The error, behind which the connection is closed: what is left of the request is not read."""
        self.close_connection = True
        return error

    def _begin(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self._has_begun = True
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Cache-Control": "no-store", **headers}.items():
            self.send_header(name, value)
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


class LocalServer(ThreadingHTTPServer):
    """A server on 127.0.0.1 whose port is taken at once, and which listens when `listen` says so.

    `answer` gets each request that may be answered. `report_fault` gets what it raises beside RequestError and Gone,
    and says what the client is told. Raises UserError for a port that cannot be had.
    """

    daemon_threads = True
    # On Windows it would let two servers have one port.
    allow_reuse_address = os.name != "nt"

    def __init__(self, port: int) -> None:
        super().__init__((HOST, port), Handler, bind_and_activate=False)
        self.is_ending = False
        self.answer: Callable[[Handler], None] = lambda handler: None
        self.report_fault: Callable[[BaseException | None], RequestError] = lambda error: RequestError("", status=500)
        self._open = threading.Semaphore(MAX_CONNECTIONS)
        try:
            self.server_bind()
        except (OSError, OverflowError) as error:
            self.server_close()
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            what = f"port {port} of {HOST} cannot be had ({why})"
            raise UserError(what, "name another port, or 0 for any free one") from error
        names = (HOST, "localhost")
        # A client leaves out the protocol's own port.
        self.names = (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == 80 else ()))

    def listen(self) -> None:
        self.server_activate()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._open.acquire(blocking=False):
            self.shutdown_request(request)  # whoever opens so many is not waiting for an answer
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._open.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.report_fault(sys.exc_info()[1])


class Line:
    """Those who wait for the model: one at a time, in the order in which they came, and not more than `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def turn(self, is_gone: Callable[[], bool]) -> Iterator[None]:
        """While it is open, nobody else has a turn. Raises RequestError where too many wait, Gone where `is_gone`."""
        ticket = object()
        with self._changed:
            if len(self._waiting) > self._most:
                what = f"{self._most} requests are waiting already: try again later"
                raise RequestError(what, code="overloaded", status=503)
            self._waiting.append(ticket)
        try:
            with self._changed:
                while self._waiting[0] is not ticket:
                    self._changed.wait(_LOOK_SECONDS)
                    if is_gone():
                        raise Gone
            yield
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def is_empty(self, seconds: float) -> bool:
        """Wait until nobody has a turn or waits for one, for so long at most."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)
