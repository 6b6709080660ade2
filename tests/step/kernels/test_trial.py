"""Kernels are taken where they run and are right."""

from __future__ import annotations

import pytest
import torch

from qlora.step.kernels import operators, trial
from tests.card import Card, rehearsal

CPU = torch.device("cpu")


def test_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "find_spec", lambda name: name)
    assert not trial.work(CPU)


def test_a_card_has_them_where_triton_is_and_what_they_give_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    trial._right.cache_clear()
    with rehearsal(monkeypatch, Card()):
        monkeypatch.setattr(trial, "find_spec", lambda name: None)
        assert not trial.work(CPU)
        monkeypatch.setattr(trial, "find_spec", lambda name: name)
        assert trial.work(CPU)  # the twins stand in for the kernels
    trial._right.cache_clear()


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_what_is_wrong_or_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    real, calls = operators.gated, []

    def gated(e: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        calls.append(e)
        if fault == "fails" and len(calls) == 2:
            raise RuntimeError("Triton Error [CUDA]: no kernel image")
        return real(e, g) * (1.0 if len(calls) == 1 else g.sign())

    trial._right.cache_clear()
    monkeypatch.setattr(operators, "gated", gated)
    assert not trial._right(CPU) and len(calls) == 2
    trial._right.cache_clear()
