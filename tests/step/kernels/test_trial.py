"""Kernels are taken where they run and are right."""

from __future__ import annotations

from inspect import isfunction
from typing import Any

import pytest
import torch

from qlora.step.kernels import experts, operators, trial
from tests.card import Card, rehearsal

CPU = torch.device("cpu")


def test_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "find_spec", lambda name: name)
    assert not trial.work(CPU)


def test_a_card_has_them_where_triton_is_and_what_they_give_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    trial._right.cache_clear()
    with rehearsal(monkeypatch, Card()) as card:
        assert not trial.work(CPU)
        card.has_triton = True
        assert trial.work(CPU)  # the twins stand in for the kernels
    trial._right.cache_clear()


KERNELS = (
    *("gated", "gated_adapted", "gated_backward_", "rms_norm", "rms_norm_backward", "dequantize"),
    *("rope_qk", "cross_entropy_"),
)


@pytest.mark.parametrize("fault", ["wrong", "fails"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_wrong_or_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch, kernel: str, fault: str) -> None:
    """Of every kernel: `about` is right on the host, and not on the device that is asked for after it."""
    real, outcomes = getattr(operators, kernel), trial._outcomes
    there: list[bool] = []

    def about(*given: Any) -> Any:
        if there[-1] and fault == "fails":
            raise RuntimeError("Triton Error [CUDA]: no kernel image")
        result = real(*given)
        if there[-1]:
            first = next(
                one for one in (*(result if isinstance(result, tuple) else (result,)), *given) if one is not None
            )
            first[0] += 0.25
        return result

    def outcomes_there(device: torch.device) -> list[torch.Tensor]:
        there.append(bool(there))
        return outcomes(device)

    trial._right.cache_clear()
    monkeypatch.setattr(operators, kernel, about)
    monkeypatch.setattr(trial, "_outcomes", outcomes_there)
    assert not trial._right(CPU) and there == [False, True]
    trial._right.cache_clear()


def test_every_kernel_is_tried() -> None:
    own = {name for name, one in vars(operators).items() if isfunction(one) and one.__module__ == operators.__name__}
    assert {name for name in own if not name.startswith("_") and not name.endswith("_plainly")} == set(KERNELS)


def test_a_card_multiplies_experts_where_triton_is_and_what_that_gives_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial._right_with_experts.cache_clear()
    monkeypatch.setattr(trial, "find_spec", lambda name: name)
    assert not trial.multiplies_experts(CPU)
    with rehearsal(monkeypatch, Card()) as card:
        assert not trial.multiplies_experts(CPU)
        card.has_triton = True
        assert trial.multiplies_experts(CPU)  # the twins stand in for the kernels
        monkeypatch.setattr(trial, "computes_bf16", lambda device: False)  # a T4, without bf16
        assert not trial.multiplies_experts(CPU)
    trial._right_with_experts.cache_clear()


def spoiled(result: Any, how: str) -> Any:
    if isinstance(result, tuple):
        return (*result[:3], spoiled(result[3], how), result[4])
    if how == "fails":
        raise RuntimeError("Triton Error [CUDA]: no kernel image")
    return result.flip(0) if how == "other experts" else result + 2**-20 * (how == "last bits")


@pytest.mark.parametrize("fault", ["other experts", "fails", "last bits"])
@pytest.mark.parametrize("kernel", ["grouped", "unnest", "route"])
def test_a_product_with_experts_that_is_wrong_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, kernel: str, fault: str
) -> None:
    """Constants must be right to the bit, products to what rounding makes of them."""
    real, outcomes = getattr(experts, kernel), trial._of_experts
    there: list[bool] = []

    def outcomes_there(device: torch.device) -> list[torch.Tensor]:
        there.append(bool(there))
        return outcomes(device)

    trial._right_with_experts.cache_clear()
    monkeypatch.setattr(experts, kernel, lambda *given: spoiled(real(*given), fault) if there[-1] else real(*given))
    monkeypatch.setattr(trial, "_of_experts", outcomes_there)
    harmless = (kernel, fault) == ("grouped", "last bits")
    assert trial._right_with_experts(CPU) is harmless and there == [False, True]
    trial._right_with_experts.cache_clear()
