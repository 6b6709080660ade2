"""Tokens a second: measured beside an ideal that is made of this device's own rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.prove import speed
from tests.prove.cases import broken, holds


def test_it_holds_and_faster_than_the_ideal_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = holds(speed.PROOF, tmp_path).measured
    assert all(float(measured[name] or 0) > 0 for name in ("tokens_per_second", "matmul_teraflops"))
    assert float(measured["copy_gigabytes_per_second"] or 0) > 0
    monkeypatch.setattr(speed, "_ideal", lambda *_: 1e-3)
    broken(speed.PROOF, tmp_path)
