"""The context: measured on a stand-in for a card, told beside what was said, broken where it takes more."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import device
from qlora.memory import overheads
from qlora.prove import context
from tests.card import CONTEXT_BYTES, GIB, MIB, Card, rehearsal
from tests.prove.cases import broken, holds, place


def test_a_cpu_has_none(tmp_path: Path) -> None:
    assert context.PROOF.run(place(tmp_path)).holds is None


def test_what_it_takes_is_recorded_beside_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs had 300 MiB before: they are no part of it."""
    with rehearsal(monkeypatch, Card(total=2 * GIB)) as card:
        assert context.PROOF.run(place(tmp_path)).holds is None  # nobody looked before
        card.context = 300 * MIB + 150 * MIB
        device.measure_context(card.total - 300 * MIB)
        outcome = holds(context.PROOF, tmp_path)
        expected, margin = overheads.context_bytes(None)
        assert outcome.measured["context_bytes_by_first_kernel"] == 150 * MIB
        assert outcome.measured["context_bytes_grown_by_a_step"] == 0
        assert expected + margin > 150 * MIB + CONTEXT_BYTES
        card.context += 1 * GIB
        device.measure_context(card.total - 600 * MIB)
        broken(context.PROOF, tmp_path)
