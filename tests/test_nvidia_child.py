"""The driver's library, asked in a process of its own: no library is no answer, a library's codes are passed on."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from qlora import nvidia, nvidia_child


class Library:
    def __init__(self, status: int, cards: int) -> None:
        self.status, self.cards = status, cards

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, place: Any) -> int:
        place._obj.value = 12040
        return 0

    def cuDeviceGetCount(self, place: Any) -> int:
        place._obj.value = self.cards
        return 0


@pytest.mark.parametrize(
    ("status", "cards", "said"),
    [(0, 2, "status 0 cuda 12040 cards 2"), (100, 0, "status 100 cuda 12040 cards 0")],
)
def test_its_codes_are_passed_on(
    status: int, cards: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(status, cards))
    nvidia_child.main()
    assert capsys.readouterr().out.strip() == said


@pytest.mark.skipif(nvidia.signs().of_a_card, reason="this machine has a card")
def test_without_the_library_there_is_no_answer() -> None:
    assert nvidia._ask_library().failure == "its library cannot be loaded"
