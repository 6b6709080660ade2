"""The device that computes: a CPU has an answer to every question, and a GPU that lacks bf16 is none."""

from __future__ import annotations

import weakref

import pytest
import torch

from qlora import device
from qlora.device import Card

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_cpu_answers_everything() -> None:
    assert device.name_of(CPU) == "cpu" and device.computes_bf16(CPU)
    assert device.peak_bytes(CPU) is None
    assert not device.is_card(CPU) and device.is_card(CUDA)


@pytest.mark.parametrize(("is_there", "used"), [(False, "cpu"), (True, "cuda:1")])
def test_torchs_own_gpu_computes_where_there_is_one(is_there: bool, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
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


def test_random_numbers_drawn_inside_are_as_if_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"card": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda place: states["card"].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, place: states.update(card=state))
    before = torch.get_rng_state()
    for place in (CPU, CUDA):
        with device.random_state_kept(place):
            torch.rand(3)
            states["card"] += 1 if place == CUDA else 0
        assert torch.equal(torch.get_rng_state(), before) and states["card"].tolist() == [1]
