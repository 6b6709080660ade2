"""The memory limit: a CPU has none; on a stand-in for a card the proof holds, and is broken where nothing limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import device
from qlora.prove import limit
from tests.card import Card, rehearsal
from tests.prove.cases import broken, holds, place


def test_a_cpu_has_none(tmp_path: Path) -> None:
    assert limit.PROOF.run(place(tmp_path)).holds is None


def test_it_holds_on_a_card_and_is_broken_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, Card()) as card:
        outcome = holds(limit.PROOF, tmp_path)
        assert card.limit == card.total  # and nothing of it stays
    assert int(outcome.measured["rows_at_once"] or 0) < limit.ROWS and outcome.measured["recovered"]
    monkeypatch.setattr(device, "limit_memory", lambda *_: None)
    with rehearsal(monkeypatch, Card()):
        assert broken(limit.PROOF, tmp_path).measured["recovered"] == 0
