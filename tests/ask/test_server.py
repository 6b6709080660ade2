"""OpenAI's chat protocol as its client reads it: whole and streamed, one at a time, ended by a client that goes."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from typing import Any

import pytest

from qlora.ask import transport
from qlora.ask.transport import LocalServer
from qlora.errors import DoesNotFit, ExportError, ModelError
from tests.ask.cases import ToyLlama, call, served, user

HI = {"messages": [user("hi")], "model": "toy.gguf"}


@pytest.fixture
def live() -> ToyLlama:
    return ToyLlama()


def events(server: LocalServer, **body: Any) -> list[Any]:
    """The events of a streamed answer, parsed; the last is the text that ends it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = json.dumps({**HI, "stream": True, **body})
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.getheader("Content-Type", "").startswith("text/event-stream")
    lines = answer.read().decode().split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") and "\n" not in line for line in lines)
    found = [line.removeprefix("data: ") for line in lines]
    return [json.loads(text) if text.startswith("{") else text for text in found]


def test_models_are_listed(live: ToyLlama) -> None:
    with served(live) as (server, sink):
        status, models = call(server, None, "/v1/models")
        assert status == 200 and [model["id"] for model in models["data"]] == ["toy.gguf"]
        assert call(server, None, "/v1/models/toy.gguf")[1] == models["data"][0]
        for path in ("/", "/v1/models/other", "/v1/completions", "/v1/chat/completions"):
            assert call(server, None, path)[0] in (404, 405)
        assert call(server, {}, "/v1/models")[0] == 405
        assert f"127.0.0.1:{server.server_port}" in sink.of("notice")[0].message  # type: ignore[attr-defined]


def test_a_whole_answer(live: ToyLlama) -> None:
    with served(live) as (server, _):
        status, answer = call(server, {**HI, "user": "me"})
        assert status == 200 and answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": "[hi]", "refusal": None}
        assert choice["finish_reason"] == "stop"
        usage = answer["usage"]
        assert usage["completion_tokens"] == 4 and usage["total_tokens"] == usage["prompt_tokens"] + 4
        assert call(server, {**HI, "max_tokens": 2})[1]["choices"][0]["finish_reason"] == "length"
        assert call(server, {**HI, "stop": ["i]"]})[1]["choices"][0]["message"]["content"] == "[h"
        history = [user("hi"), {"role": "assistant", "content": "[hi]"}, user("and?")]
        usage = call(server, {**HI, "messages": history})[1]["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 20  # the conversation so far is not computed again


def test_a_streamed_answer(live: ToyLlama) -> None:
    live.answer = lambda _: "grün"
    with served(live) as (server, _):
        *chunks, end = events(server)
        assert end == "[DONE]" and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1 and "usage" not in chunks[0]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert [delta["content"] for delta in deltas[1:-1]] == ["g", "r", "ü", "n"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
        *chunks, usage, _ = events(server, stream_options={"include_usage": True})
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 5 and chunks[0]["usage"] is None


def test_a_system_prompt_of_the_command_holds_where_a_request_has_none(live: ToyLlama) -> None:
    with served(live, system="Be kind.") as (server, _):
        call(server, HI)
        assert b"Be kind." in bytes(token for token in live.row if token < 256)
        call(server, {**HI, "messages": [{"role": "developer", "content": "Own."}, user("hi")]})
        assert b"Be kind." not in bytes(token for token in live.row if token < 256)


def test_what_cannot_be_answered_is_said_in_the_protocol_s_shape(live: ToyLlama) -> None:
    with served(live) as (server, _):
        status, answer = call(server, {**HI, "n": 3})
        assert status == 400 and answer["error"]["param"] == "n"
        status, answer = call(server, {**HI, "messages": [user("x" * 500)]})
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert call(server, {**HI, "model": "other"})[0] == 404 and call(server, b"{")[0] == 400
        assert call(server, HI)[0] == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DoesNotFit("/home/me/x.gguf: no memory", "less"), 503), (ModelError("/home/me/x: nan", "other"), 500),
        (KeyError("/home/me/x"), 500), (OSError(28, "full", "/home/me/x"), 500), (RecursionError(), 500),
    ],
)  # fmt: skip
def test_an_answer_that_fails_ends_the_request_and_not_the_server(
    live: ToyLlama, error: Exception, status: int
) -> None:
    def fail() -> None:
        raise error

    with served(live) as (server, sink):
        live.before_each = fail
        found, whole = call(server, HI)
        *_, last = events(server)
        assert found == status and whole == last
        assert last["error"]["message"] and last["error"]["type"] == "server_error" and "/home" not in str(last)
        said = [event.as_dict()["message"] for event in sink.of("notice")][1:]
        assert len(said) == 2 and all(getattr(error, "what", type(error).__name__) in message for message in said)
        live.before_each = lambda: None
        assert call(server, HI)[1]["choices"][0]["message"]["content"] == "[hi]"


def test_a_crash_over_the_question_is_not_told_as_a_fault_of_the_question(live: ToyLlama) -> None:
    def crash(text: str) -> list[int]:
        raise ExportError("/models/toy.gguf: llama.cpp crashed (SIGSEGV)", "export it again")

    with served(live) as (server, _):
        assert call(server, HI)[0] == 200
        tokenize, live.tokenize = live.tokenize, crash  # type: ignore[method-assign]
        status, answer = call(server, HI)
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert answer["error"]["param"] is None and "/models" not in answer["error"]["message"]
        live.tokenize = tokenize  # type: ignore[method-assign]
        assert call(server, HI)[0] == 200


def test_a_client_that_reads_drop_by_drop_holds_up_nobody(live: ToyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "WRITE_SECONDS", 0.5)
    live.answer = lambda _: "x" * 300
    with served(live) as (server, _), socket.socket() as connection:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", server.server_port))
        data = json.dumps({**HI, "stream": True, "max_tokens": 300}).encode()
        head = f"Host: localhost:{server.server_port}\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Type: application/json\r\n\r\n".encode() + data
        )
        found, answers = b"", list[int]()
        waiting = threading.Thread(target=lambda: answers.append(call(server, {**HI, "max_tokens": 1})[0]))
        while True:  # never silent for so long as an answer may wait in all
            try:
                piece = connection.recv(256)
            except ConnectionError:
                break
            if not piece:
                break
            if not found:
                waiting.start()
            found += piece
            time.sleep(0.05)
        waiting.join(20)
    assert found.startswith(b"HTTP/1.1 200 ") and b"[DONE]" not in found and answers == [200]


def test_a_client_that_goes_away_stops_its_answer(live: ToyLlama) -> None:
    live.answer = lambda _: "x" * 300
    live.before_each = lambda: time.sleep(0.02)
    with served(live) as (server, _):
        for stream in (True, False):
            live.computed.clear()
            data = json.dumps({**HI, "stream": stream, "max_tokens": 300}).encode()
            head = f"Host: localhost:{server.server_port}\r\nContent-Length: {len(data)}\r\n"
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
                kind = "Content-Type: application/json\r\n\r\n"
                connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}{kind}".encode() + data)
                while len(live.computed) < 5:
                    time.sleep(0.01)
            live.before_each = lambda: None
            status, _ = call(server, {**HI, "max_tokens": 1})
            assert status == 200 and len(live.computed) < 100
            live.before_each = lambda: time.sleep(0.02)


def test_answers_are_written_one_at_a_time(live: ToyLlama) -> None:
    at_work: list[int] = [0, 0]

    def work() -> None:
        at_work[0] += 1
        at_work[1] = max(at_work)
        time.sleep(0.005)
        at_work[0] -= 1

    live.before_each = work
    with served(live) as (server, _):
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda n=n: answers.append(call(server, {"messages": [user(str(n))]})))
            for n in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert at_work[1] == 1 and len({answer["choices"][0]["message"]["content"] for _, answer in answers}) == 5


def test_thoughts_that_the_prompt_opens_come_with_their_mark() -> None:
    from tests.families import CHATML

    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    live = ToyLlama(lambda _: "........so</think>yes", template)
    with served(live) as (server, _):
        content = call(server, HI)[1]["choices"][0]["message"]["content"]
    assert content.startswith("<think>\n") and content.endswith("so</think>yes")
