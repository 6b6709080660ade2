"""Copies to the device: the proof holds, and counts micro-batches that did not arrive whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.data.ahead import BlockBatch
from qlora.prove import copies
from tests.prove.cases import broken, holds


def test_it_holds_and_counts_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(copies.PROOF, tmp_path)
    honest, seen = BlockBatch.to, []

    def late(batch: BlockBatch, device: torch.device) -> Any:
        seen.append(True)
        there = honest(batch, device)
        return replace(there, targets_BS=there.targets_BS + 1) if len(seen) == 3 else there

    monkeypatch.setattr(BlockBatch, "to", late)
    outcome = broken(copies.PROOF, tmp_path)
    assert outcome.measured["wrong"] == 1 and "wrong: [2]" in outcome.said
