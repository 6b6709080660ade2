"""Memory after a run: the proof holds, and is broken by whatever still holds the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.prove import release
from tests.card import Card, rehearsal
from tests.prove.cases import broken, holds


def test_it_holds_and_a_model_that_is_kept_breaks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, Card()):
        outcome = holds(release.PROOF, tmp_path)
    assert int(outcome.measured["bytes_during"] or 0) > 0 and outcome.measured["bytes_left"] == 0
    honest, kept = release.make, []

    def keeping(*arguments: Any) -> Any:
        kept.append(honest(*arguments))
        return kept[-1]

    monkeypatch.setattr(release, "make", keeping)
    outcome = broken(release.PROOF, tmp_path)
    assert outcome.measured["alive"] == outcome.measured["tensors"]
