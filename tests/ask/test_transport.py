"""HTTP is bounded, and no web page is answered."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from qlora.ask import transport
from qlora.ask.requests import RequestError
from qlora.ask.transport import Gone, Line, LocalServer
from qlora.errors import UserError
from tests.ask.cases import ToyLlama, call, served, user

HI = {"messages": [user("hi")]}


@pytest.fixture(scope="module")
def server():  # type: ignore[no-untyped-def]
    with served(ToyLlama()) as (found, _):
        yield found


def raw(server: LocalServer, data: bytes, wait: float = 20) -> bytes:
    """All that comes back on a connection, until it is closed."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        while piece := connection.recv(1 << 16):
            found += piece
        return found


def test_it_is_bound_to_this_machine_alone(server: LocalServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:3000"},
        {"Host": "evil.example"}, {"Host": "evil.example:{port}"}, {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:{port}.evil.example"},
        {"Host": "0.0.0.0:{port}"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
    ],
)  # fmt: skip
def test_a_web_page_is_not_answered(server: LocalServer, headers: dict[str, str]) -> None:
    said = {name: value.format(port=server.server_port) for name, value in headers.items()}
    for body in (None, HI):
        path = "/v1/models" if body is None else "/v1/chat/completions"
        status, answer = call(server, body, path, **said)
        assert status == 403 and "choices" not in answer and "data" not in answer


def test_programs_are_answered_by_either_name(server: LocalServer) -> None:
    for name in ("127.0.0.1", "localhost", "LOCALHOST"):
        assert call(server, None, "/v1/models", Host=f"{name}:{server.server_port}")[0] == 200


def test_no_header_invites_a_page(server: LocalServer) -> None:
    host = f"Host: 127.0.0.1:{server.server_port}\r\n".encode()
    for request in (b"OPTIONS /v1/models HTTP/1.1\r\n", b"GET /v1/models HTTP/1.1\r\n"):
        answer = raw(server, request + host + b"Connection: close\r\n\r\n")
        assert b"Access-Control" not in answer and answer.startswith(b"HTTP/1.1 ") and b"Python" not in answer
    form = b"POST /v1/chat/completions HTTP/1.1\r\n" + host + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}"
    assert b" 415 " in raw(server, form)  # what a form of a page may send without asking first


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Content-Length: 99999999999999999999999\r\n", b" 413 "), (b"Content-Length: 5000000\r\n", b" 413 "),
        (b"Content-Length: 000000000000000000000000002\r\n", b" 413 "),
        (b"Content-Length: -1\r\n", b" 411 "), (b"Transfer-Encoding: chunked\r\n", b" 411 "), (b"", b" 411 "),
        (b"Content-Length: 1\r\nContent-Length: 2\r\n", b" 411 "), (b"X: " + b"a" * 40_000 + b"\r\n", b" 431 "),
        (b"".join(b"X%d: a\r\n" % n for n in range(3000)), b" 431 "), (b"Host: two\r\n", b" 403 "),
    ],
)  # fmt: skip
def test_what_is_too_large_is_refused_unread(server: LocalServer, headers: bytes, status: bytes) -> None:
    host = f"Host: 127.0.0.1:{server.server_port}\r\n".encode()
    line = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    answer = raw(server, line + host + headers + b"\r\n")
    assert status in answer.split(b"\r\n", 1)[0]


def test_what_is_no_http_is_answered_and_closed(server: LocalServer) -> None:
    for data in (b"\x16\x03\x01\x02\x00\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 50_000):
        assert b"Traceback" not in raw(server, data)
    assert call(server, None, "/v1/models")[0] == 200


def test_a_body_that_nobody_reads_is_not_the_next_request(server: LocalServer) -> None:
    host = f"Host: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n".encode()
    inner = b"GET /v1/models HTTP/1.1\r\n" + host + b"\r\n"
    for first in (b"POST /v1/embeddings", b"GET /v1/models", b"PUT /v1/models"):
        length = f"Content-Length: {len(inner)}\r\n\r\n".encode()
        answer = raw(server, first + b" HTTP/1.1\r\n" + host + length + inner)
        assert answer.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in answer
    two = [
        (b"POST /v1/chat/completions", b"[]"),
        (b"GET /v1/models", b""),
    ]  # one that is read leaves the connection open
    sent = b"".join(
        line + b" HTTP/1.1\r\n" + host + (f"Content-Length: {len(body)}\r\n\r\n".encode() if body else b"\r\n") + body
        for line, body in two
    )
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(sent)
        found = b""
        while found.count(b"HTTP/1.1 ") < 2 or not found.endswith(b"}"):
            found += connection.recv(1 << 16)
    assert b" 400 " in found and b" 200 " in found


def test_a_first_line_without_an_end_is_answered(server: LocalServer) -> None:
    assert b" 431 " in raw(server, b"GET /" + b"x" * 40_000)


def test_who_dawdles_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(transport, "BODY_SECONDS", 0.5)
    with served(ToyLlama()) as (server, _):
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            for _ in range(100):  # a byte now and then, never a whole line
                try:
                    connection.sendall(b"G")
                except OSError:
                    break
                time.sleep(0.05)
            assert time.monotonic() - begun < 4
        host = f"Host: 127.0.0.1:{server.server_port}\r\n".encode()
        line = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        assert b" 408 " in raw(server, line + host + b"\r\n{")


def test_more_connections_than_may_be_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_CONNECTIONS", 3)
    with served(ToyLlama()) as (server, _):
        held = [socket.create_connection(("127.0.0.1", server.server_port), timeout=20) for _ in range(3)]
        time.sleep(0.2)
        assert raw(server, b"") == b""
        for connection in held:
            connection.close()
        for _ in range(50):
            try:
                assert call(server, None, "/v1/models")[0] == 200
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError("it does not answer any more")


def test_a_port_that_is_taken_is_two_lines() -> None:
    with LocalServer(0) as one, pytest.raises(UserError, match="cannot be had") as refused:
        one.listen()
        LocalServer(one.server_port)
    assert refused.value.exit_code == 2 and "another port" in refused.value.hint


def test_turns_come_in_order_and_few_may_wait() -> None:
    line, order, gone = Line(2), [], threading.Event()
    first = line.turn(lambda: False)
    first.__enter__()

    def wait(name: str) -> None:
        try:
            with line.turn(lambda: name == "b" and gone.is_set()):
                order.append(name)
        except Gone:
            order.append(f"{name} left")

    threads = []
    for name in ("a", "b"):
        threads.append(threading.Thread(target=wait, args=(name,)))
        threads[-1].start()
        time.sleep(0.1)
    with pytest.raises(RequestError) as refused, line.turn(lambda: False):
        pass
    assert refused.value.status == 503
    gone.set()
    time.sleep(0.5)
    first.__exit__(None, None, None)
    for thread in threads:
        thread.join(10)
    assert order == ["b left", "a"] and line.is_empty(1)
