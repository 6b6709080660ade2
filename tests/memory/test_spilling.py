"""A driver that moves tensors to RAM without a word is seen by what it does to the steps, and said once."""

from __future__ import annotations

import pytest
import torch

from qlora import device
from qlora.events import Recorder, StepDone
from qlora.memory.spilling import SpillWatch
from tests.card import GIB, Card, rehearsal

CPU = torch.device("cpu")


def step(number: int, seconds: float, tokens: int = 1000) -> StepDone:
    return StepDone(number, 1.0, 2.0, 1e-4, 0.5, tokens, tokens, tokens / seconds, 0, seconds)


def notices(monkeypatch: pytest.MonkeyPatch, seconds: list[float], free: int, spills: bool = True) -> list[str]:
    recorder = Recorder()
    monkeypatch.setattr(device, "may_spill", lambda: spills)
    monkeypatch.setattr(device, "free_bytes", lambda _: free)
    with rehearsal(monkeypatch, Card(total=8 * GIB)):
        watch = SpillWatch(CPU, recorder)
        for number, one in enumerate(seconds, 1):
            watch.after_step(step(number, one))
    return [event.as_dict()["message"] for event in recorder.of("notice")]


SLOW = [1.0, 0.4, 0.4, 0.4, 0.4, 0.4, 1.2, 1.2, 1.3]


def test_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = notices(monkeypatch, SLOW, free=299 << 20)
    assert message.startswith("step 7 took 3.0 times as long a token") and "memory.limit" in message


@pytest.mark.parametrize(
    ("seconds", "free", "spills"),
    [
        (SLOW, 301 << 20, True),  # the card has room: something else is slow
        (SLOW, 0, False),  # a driver that fails instead
        ([1.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.7, 0.5], 0, True),
        ([9.0, 0.4, 0.4, 0.4, 0.4], 0, True),  # the first step loads kernels
    ],
)
def test_it_is_not_said(monkeypatch: pytest.MonkeyPatch, seconds: list[float], free: int, spills: bool) -> None:
    assert notices(monkeypatch, seconds, free, spills) == []


def test_longer_rows_are_no_slower_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(device, "may_spill", lambda: True)
    with rehearsal(monkeypatch, Card(total=1)):
        watch = SpillWatch(CPU, recorder)
        for number in range(1, 9):
            watch.after_step(step(number, float(number), 1000 * number))
    assert recorder.of("notice") == []
