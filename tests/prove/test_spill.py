"""Spilling: a card that gives more than it has free breaks the promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import device
from qlora.prove import spill
from tests.card import GIB, MIB, Card, rehearsal
from tests.prove.cases import broken, holds, place


def test_a_cpu_has_no_memory_of_its_own(tmp_path: Path) -> None:
    assert spill.PROOF.run(place(tmp_path)).holds is None


def test_it_holds_where_the_limit_does_and_else_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, Card(total=GIB)) as card:
        outcome = holds(spill.PROOF, tmp_path)
        assert card.out_of_memory == 1 and card.live < MIB
    assert int(outcome.measured["taken_bytes"] or 0) <= GIB
    monkeypatch.setattr(device, "limit_memory", lambda *_: None)
    with rehearsal(monkeypatch, Card(total=GIB)) as card:
        card.limit = 100 * GIB  # as a display driver under Windows has it
        assert "even more" in broken(spill.PROOF, tmp_path).said
