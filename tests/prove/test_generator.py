"""Random numbers of a step: the proof holds, and says so when seeds are not set."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.prove import generator
from tests.prove.cases import broken, holds


def test_it_holds_and_is_broken_without_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(generator.PROOF, tmp_path)
    monkeypatch.setattr(generator, "seed_micro_batch", lambda *_: None)
    assert "same seed, same numbers" in broken(generator.PROOF, tmp_path).said
