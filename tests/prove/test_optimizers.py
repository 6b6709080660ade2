"""Updates: the proof holds, and names an optimizer that is not the library's, or whose state is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.prove import optimizers
from qlora.step.optimizer import AdapterOptimizer
from tests.prove.cases import broken, holds


def test_it_holds_for_each_optimizer(tmp_path: Path) -> None:
    assert len(holds(optimizers.PROOF, tmp_path).measured) == 3 * len(optimizers.NAMES)


def test_another_arithmetic_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "LION_BETAS", (0.8, 0.99))
    assert broken(optimizers.PROOF, tmp_path).said == "lion_8bit is not the library's"


def test_moments_that_are_lost_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AdapterOptimizer.load_state

    def masters_only(own: AdapterOptimizer, tensors: Any, counters: Any) -> None:
        honest(own, tensors, {})

    monkeypatch.setattr(AdapterOptimizer, "load_state", masters_only)
    assert "adamw_8bit does not come back" in broken(optimizers.PROOF, tmp_path).said
