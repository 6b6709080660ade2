"""The device that computes: a CPU has an answer to every question, and a GPU that lacks bf16 is none."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import accelerate
import pytest
import torch

from qlora import device
from qlora.device import Card

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_cpu_answers_everything() -> None:
    assert device.name_of(CPU) == "cpu" and device.computes_bf16(CPU)
    assert device.peak_bytes(CPU) is None
    assert device.with_own_random_state(CPU) == []


@pytest.mark.parametrize(("found", "used"), [("cpu", "cpu"), ("cuda:0", "cuda:0"), ("xpu:0", "xpu:0"), ("mps", "cpu")])
def test_what_cannot_train_is_passed_over(found: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(device=torch.device(found)))
    assert device.current() == torch.device(used)


@pytest.mark.parametrize(("is_there", "has_bf16"), [(False, False), (True, False), (True, True)])
def test_a_card_needs_bf16_that_is_not_emulated(
    is_there: bool, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation  # as torch answers for older cards

    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 8))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "RTX 3070")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert device.card() == (Card("RTX 3070", 5, 8, (8, 6)) if is_there and has_bf16 else None)
    assert device.computes_bf16(CUDA) is has_bf16


def test_memory_is_given_back_with_what_refers_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    watched = weakref.ref(Cycle())
    device.release_memory(CPU)
    assert watched() is None and not emptied
    device.release_memory(CUDA)
    assert emptied


def test_a_gpus_random_state_is_kept_with_the_cpus() -> None:
    assert device.with_own_random_state(CUDA) == [CUDA]


def test_a_side_stream_waits_for_the_default_one_and_it_for_the_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes launches on the default stream stands in order with what was asked of the current one."""
    order: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            order.append(f"{self.name} waits for {other.name}")

    default, side = Stream("default"), Stream("side")
    current = [default]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: current[0])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda place: default)

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        order.append(f"on {chosen.name}")
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    for place in (CUDA, CPU):
        with device.on_default_stream(place):
            order.append("work")
    assert order == ["work", "work"]
    order.clear()
    current[0] = side
    with device.on_default_stream(CUDA):
        order.append("work")
    assert order == ["default waits for side", "on default", "work", "side waits for default"]


def test_a_gpu_is_waited_for_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device.synchronize(CPU)
    device.synchronize(CUDA)
    assert waited == [CUDA]
