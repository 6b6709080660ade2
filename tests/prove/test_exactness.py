"""The exact gradient: the proof holds, is broken by one other bit, and by an operation without an exact form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import determinism
from qlora.prove import exactness
from qlora.prove.model import Made
from tests.card import Card, rehearsal
from tests.prove.cases import broken, holds


def test_it_holds_and_one_other_bit_breaks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(exactness.PROOF, tmp_path)
    honest, calls = Made.gradient, []

    def other(made: Made, *batches: Any) -> list[torch.Tensor]:
        calls.append(True)
        found = honest(made, *batches)
        if len(calls) == 2:
            found[0].view(torch.int32)[0, 0] ^= 1
        return found

    monkeypatch.setattr(Made, "gradient", other)
    assert 0 < float(broken(exactness.PROOF, tmp_path).measured["apart"] or 0) < 1e-3


def test_on_a_card_the_strict_mode_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(determinism.WORKSPACE, determinism.FIXED_WORKSPACE)
    honest, modes = Made.gradient, []

    def seen(made: Made, *batches: Any) -> list[torch.Tensor]:
        modes.append(torch.are_deterministic_algorithms_enabled())
        modes.append(torch.is_deterministic_algorithms_warn_only_enabled())
        return honest(made, *batches)

    monkeypatch.setattr(Made, "gradient", seen)
    with rehearsal(monkeypatch, Card()):
        holds(exactness.PROOF, tmp_path)
    assert modes == [True, False, True, False, False, False, False, False]

    def without(made: Made, *batches: Any) -> list[torch.Tensor]:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set …")
        return honest(made, *batches)

    monkeypatch.setattr(Made, "gradient", without)
    with rehearsal(monkeypatch, Card()):
        assert "cumsum_cuda_kernel has no exact form" in broken(exactness.PROOF, tmp_path).said
