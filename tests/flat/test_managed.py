"""Memory that the driver manages: asked for once, given back, and only where it can be used."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch

from qlora import device as hardware
from qlora.flat import managed
from qlora.flat.managed import ManagedMemory, why_not
from tests.flat.cases import driver_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def answering(value: int, error: int = 0) -> Any:
    """cudaDeviceGetAttribute of a card whose attribute has this value."""

    def ask(answer: Any, attribute: ctypes.c_int, device: ctypes.c_int) -> int:
        assert attribute.value == 89 and device.value == 0
        answer._obj.value = value
        return error

    return ask


def test_it_is_zero_brought_and_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of(monkeypatch)
    memory = ManagedMemory(1024, CPU)
    assert memory.tensor.numel() == 1024 and not memory.tensor.any()
    memory.prefetch()
    memory.free()
    memory.free()
    del memory
    assert driver.asked == ["get", "prefetch", "wait", "free", "wait"] and not driver.given


def test_it_is_given_back_with_the_object_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of(monkeypatch)
    memory = ManagedMemory(1024, CPU)
    del memory
    gc.collect()
    assert not driver.given


def test_without_the_runtimes_function_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of(monkeypatch)
    monkeypatch.setattr(managed, "_runtime", lambda name: None)
    ManagedMemory(1024, CPU).free()
    assert len(driver.given) == 1


@pytest.mark.parametrize(
    ("ask", "reason"),
    [(answering(1), ""), (answering(0), "WSL"), (answering(1, error=101), "no way to ask"), (None, "no way to ask")],
    ids=["it can", "it cannot", "an error", "no runtime"],
)
def test_a_driver_that_cannot_page_while_it_computes_is_not_asked_to(
    ask: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(managed, "_runtime", lambda name: ask)
    found = why_not(CUDA, 1 << 20)
    assert reason in found and bool(reason) == bool(found)


def test_without_room_in_ram_or_without_a_gpu_the_state_is_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' library ends the process where the driver has no memory to give."""
    monkeypatch.setattr(managed, "_runtime", lambda name: answering(1))
    monkeypatch.setattr(hardware, "available_ram", lambda: 100 << 20)
    assert (
        why_not(CUDA, 51 << 20) == "paging needs 102 MiB of RAM, of which 100 MiB are free; its state stays on the GPU"
    )
    assert why_not(CUDA, 50 << 20) == "" and "stays in RAM" in why_not(CPU, 1)


def test_no_library_has_no_functions() -> None:
    assert managed._runtime("no_function_of_this_name") is None
