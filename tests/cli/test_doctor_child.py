"""The child of `qlora-doctor`: it tries on the device that a command would choose, and says what was chosen."""

from __future__ import annotations

import json
import os
import sys

import pytest

from qlora.cli import cards, doctor_child
from qlora.errors import HardwareError
from qlora.events import Notice, Sink


def answers(capfd: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_what_was_chosen_is_said_and_what_is_printed_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def settle(sink: Sink) -> None:
        os.write(1, b"noise of a library\n")
        sink.emit(Notice("device", "GPU 1 is taken, as most is free"))

    monkeypatch.setattr(cards, "settle", settle)
    monkeypatch.setattr(sys, "argv", ["child", "torch", "device", "bf16"])
    doctor_child.main()
    found = answers(capfd)
    assert [one["stage"] for one in found] == ["torch", "device", "bf16"]
    assert found[1]["answer"]["notices"] == ["GPU 1 is taken, as most is free"]  # type: ignore[index]


def test_a_card_that_is_refused_is_the_devices_failure_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def settle(sink: Sink) -> None:
        raise HardwareError("its driver is too old", "install a newer one")

    monkeypatch.setattr(cards, "settle", settle)
    monkeypatch.setattr(sys, "argv", ["child", "torch", "device", "nf4", "bitsandbytes"])
    doctor_child.main()
    torch, device, nf4, bitsandbytes = answers(capfd)
    assert (device["failure"], device["mend"]) == ("its driver is too old", "install a newer one")
    assert nf4 == {"stage": "nf4", "needs": "device"} and "answer" in torch and "answer" in bitsandbytes
