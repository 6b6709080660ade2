"""One request to the hub: where the token goes, what is waited for, how much of an answer is read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qlora import hub_calls
from qlora.errors import ExportError
from qlora.hub_calls import Calls
from tests.push_hub import TOKEN, PushHub, push_hub

__all__ = ["push_hub"]


@pytest.fixture
def calls(push_hub: PushHub) -> Calls:
    return Calls.of_user()


def answering(push_hub: PushHub, status: int, body: bytes = b"{}", **headers: str) -> None:
    def reply(_number: int, handler: Any) -> bool:
        handler.reply(status, body, **headers)
        return True

    push_hub.before = reply


def test_a_redirect_is_followed_to_the_hub_alone(push_hub: PushHub, calls: Calls) -> None:
    for place in (f"{push_hub.elsewhere}/api/whoami-v2", "//localhost:1/x", "http://[", "https://127.0.0.1:1/"):
        push_hub.received.clear()
        answering(push_hub, 307, Location=place)
        with pytest.raises(ExportError, match=r"the hub sends /api/models/a/b on to another place") as error:
            calls.ask("GET", "/api/models/a/b?blobs=true")
        assert "renamed" in error.value.hint and len(push_hub.received) == 1
    answering(push_hub, 308, Location=f"{push_hub.endpoint}/api/whoami-v2")
    with pytest.raises(ExportError, match="on to another place"):  # what changes something is not sent on
        calls.ask("POST", "/api/repos/create", {"name": "x"})

    def once(number: int, handler: Any) -> bool:
        if handler.path == "/moved":
            handler.reply(307, b"", Location="/api/whoami-v2")
        return bool(handler.path == "/moved")

    push_hub.before = once
    assert calls.ask("GET", "/moved").read("x")["type"] == "user"
    answering(push_hub, 307, Location="/moved")  # in a circle
    with pytest.raises(ExportError, match="on to another place"):
        calls.ask("GET", "/moved")


def test_the_token_goes_to_the_hub_and_nowhere_else(push_hub: PushHub, calls: Calls) -> None:
    answering(push_hub, 200)
    calls.follow("POST", f"{push_hub.elsewhere}/done", {"a": 1})
    calls.put(f"{push_hub.elsewhere}/part", lambda: iter((b"ab", b"c")), 3)
    calls.follow("POST", f"{push_hub.endpoint}/verify", {"a": 1})
    (_, _, done, body), (_, _, part, data), (_, _, own, _) = push_hub.received
    assert "authorization" not in done and "authorization" not in part and own["authorization"] == f"Bearer {TOKEN}"
    assert json.loads(body) == {"a": 1} and data == b"abc" and part["content-length"] == "3"


@pytest.mark.parametrize(
    "address",
    [
        *(None, 5, "", "ftp://x/y", "file:///etc/passwd", "http://", "https://a@b/c", "https://huggingface.co\\@x/"),
        *("https://x/\r\nHost: y", "https://ü/", "https://x/ y", "https://" + "x" * 20_000, "javascript:alert(1)"),
    ],
)
def test_addresses_that_nothing_is_sent_to(calls: Calls, address: Any) -> None:
    with pytest.raises(ExportError, match="an address that nothing can be sent to"):
        calls.address(address)


def test_a_store_without_encryption_is_for_a_hub_without() -> None:
    calls = Calls("https://huggingface.co", "t")
    assert calls.address("https://store.example/x") == "https://store.example/x"
    with pytest.raises(ExportError):
        calls.address("http://store.example/x")
    mirror = Calls("https://mirror.example", "t")
    assert mirror.address("https://huggingface.co/a/b.git/x") == "https://mirror.example/a/b.git/x"
    assert not mirror.is_own("https://mirror.example.evil/") and not mirror.is_own("https://mirror.example:8443/")
    assert mirror.is_own("https://MIRROR.example:443/x") and not mirror.is_own("https://x:y/")


def test_an_answer_has_a_bound(push_hub: PushHub, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_calls, "MAX_ANSWER_BYTES", 100_000)
    answering(push_hub, 200, b"x" * 200_000)
    with pytest.raises(ExportError, match="larger than any of its own"):
        calls.ask("GET", "/api/whoami-v2")
    answering(push_hub, 200, b'{"a": ' * 50_000, Content_Encoding="gzip")  # none was asked for: it is what it is
    with pytest.raises(ExportError, match="larger than any"):
        calls.ask("GET", "/api/whoami-v2")


def test_a_hub_that_does_not_answer_is_waited_for_and_left(
    push_hub: PushHub, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_calls, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(hub_calls, "WAITS", (0.0,))
    push_hub.before = lambda _number, _handler: bool(time.sleep(0.3)) or True
    with pytest.raises(ExportError, match=r"cannot be reached \(ReadTimeout\)") as error:
        calls.ask("GET", "/api/whoami-v2")
    assert "run the same again" in error.value.hint and calls.repeated == {"ReadTimeout": 1}
    monkeypatch.setattr(hub_calls, "WAIT_SECONDS", 5.0)
    monkeypatch.setattr(hub_calls, "ANSWER_SECONDS", 0.2)

    def drip(_number: int, handler: Any) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)
        return True

    push_hub.before = drip
    with pytest.raises(ExportError, match="takes too long"):
        calls.ask("GET", "/api/whoami-v2")


def test_an_answer_that_ends_early_is_none(push_hub: PushHub, calls: Calls) -> None:
    def half(_number: int, handler: Any) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"name": ')
        handler.wfile.flush()
        return bool(handler.break_off())

    push_hub.before = half
    with pytest.raises(ExportError, match="cannot be reached"):
        calls.ask("GET", "/api/whoami-v2")


def test_a_wait_that_the_hub_asks_for_is_kept_or_told(push_hub: PushHub, calls: Calls) -> None:
    answering(push_hub, 429, Retry_After="600")
    with pytest.raises(ExportError, match=r"asks to wait \(it answers 429\)") as error:
        calls.ask("GET", "/api/whoami-v2")
    assert error.value.hint.startswith("wait 10 minutes, then run the same again") and len(push_hub.received) == 1
    for odd in ("Wed, 21 Oct 2026 07:28:00 GMT", "²", "-1", "9" * 5_000):
        answering(push_hub, 429, Retry_After=odd)
        with pytest.raises(ExportError, match=r"cannot do it now \(it answers 429\)"):
            calls.ask("GET", "/api/whoami-v2")


def test_what_may_be_done_once_is_tried_once(push_hub: PushHub, calls: Calls) -> None:
    answering(push_hub, 500)
    with pytest.raises(ExportError):
        calls.ask("POST", "/api/models/a/b/commit/main", body=b"{}", once=True)
    assert len(push_hub.received) == 1 and push_hub.received[0][2]["content-type"] == "application/x-ndjson"


def test_an_error_of_ours_while_sending_stays_ours(push_hub: PushHub, calls: Calls) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise ExportError("the file has gone", "put it back")

    with pytest.raises(ExportError, match="the file has gone"):
        calls.put(f"{push_hub.elsewhere}/store/x", chunks, 10)


def test_a_proxys_password_is_in_no_error(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def session() -> Any:
        raise ValueError("http://maria:geheim@proxy: certificate verify failed")

    monkeypatch.setattr("huggingface_hub.utils.get_session", session)
    with pytest.raises(ExportError) as error:
        calls.ask("GET", "/api/whoami-v2")
    assert error.value.what == "the hub cannot be reached (ValueError, certificate)"


def test_headers_that_the_hub_gives_go_to_the_store_and_change_nothing_of_ours(push_hub: PushHub, calls: Calls) -> None:
    answering(push_hub, 200)
    given = {"X-Amz-Meta": " a b ", "Authorization": "Basic eDp5", "Content-Length": "9", "Host": "evil", "Cookie": "x"}
    calls.put(f"{push_hub.elsewhere}/part", lambda: iter((b"abc",)), 3, given)
    calls.follow("POST", f"{push_hub.endpoint}/verify", {"a": 1}, {"authorization": "Basic eDp5"})
    calls.follow("POST", f"{push_hub.endpoint}/verify", {"a": 1}, {})
    heads = [head for _, _, head, _ in push_hub.received]
    assert [head.get("authorization") for head in heads] == ["Basic eDp5", "Basic eDp5", f"Bearer {TOKEN}"]
    assert heads[0]["x-amz-meta"] == "a b" and heads[0]["content-length"] == "3" and "cookie" not in heads[0]
    assert heads[0]["host"].startswith("localhost") and heads[0]["user-agent"].startswith("qlora/")


@pytest.mark.parametrize(
    ("name", "value"), [("a b", "x"), ("", "x"), ("x", "a\r\nb: c"), ("x", 3), ("x", None), ("x\n", "y"), ("ä", "x")]
)
def test_a_header_that_is_none_is_not_sent(push_hub: PushHub, calls: Calls, name: str, value: Any) -> None:
    with pytest.raises(ExportError, match="a header that no request can have"):
        calls.put(f"{push_hub.elsewhere}/part", lambda: iter((b"abc",)), 3, {name: value})
    assert not push_hub.received
