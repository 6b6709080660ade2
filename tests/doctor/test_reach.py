"""The hub's line: reached or not, known or not, and no secret in it."""

from __future__ import annotations

import pytest

from qlora.doctor import reach
from qlora.doctor.finding import Colour
from qlora.doctor.reach import PROXIES
from qlora.hub import Reach


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("found", "colour", "said"),
    [
        (Reach(True, token="sent", status=200), Colour.GREEN, "knows the token"),
        (Reach(True, token="sent", status=401), Colour.RED, "refuses the token"),
        (Reach(True, token="malformed"), Colour.RED, "no token has"),
        (Reach(True, status=401), Colour.GREEN, "no token"),
        (Reach(True, status=200), Colour.YELLOW, "something else answers"),
        (Reach(True, token="sent", status=503), Colour.YELLOW, "answers 503"),
        (Reach(True, status=302), Colour.YELLOW, "answers 302"),
        (Reach(True, is_offline=True), Colour.YELLOW, "HF_HUB_OFFLINE is set"),
        (Reach(True, failure="ConnectError"), Colour.YELLOW, "no connection"),
        (Reach(True, failure="ConnectError (certificate)"), Colour.YELLOW, "not trusted"),
        (Reach(True, failure="ConnectTimeout"), Colour.YELLOW, "in time"),
        (Reach(True, failure="InvalidURL"), Colour.YELLOW, "is no address"),
        (Reach(False, failure="ProxyError"), Colour.YELLOW, "the hub of HF_ENDPOINT"),
    ],
)
def test_each_case_has_its_line(found: Reach, colour: Colour, said: str) -> None:
    (line,) = reach.findings(found)
    assert line.colour == colour and said in line.said and bool(line.mend) is (colour != Colour.GREEN)


def test_a_proxy_is_named_by_its_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://maria:geheim@proxy.example.org:3128")
    (line,) = reach.findings(Reach(True, failure="ConnectError"))
    assert "the proxy of HTTPS_PROXY" in line.said
    assert not any(word in f"{line}" for word in ("maria", "geheim", "example.org"))
