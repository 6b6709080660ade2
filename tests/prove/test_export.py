"""Export: held to what the export itself measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora import api
from qlora.events import Fidelity
from qlora.prove import export, trained
from tests.prove.cases import broken, holds


@pytest.fixture
def kls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the export measures, in nats a token."""
    found: list[float] = []

    def exported(source: Path, *, sink: Any, **asked: Any) -> Any:
        sink.emit(Fidelity("rows", 1, 1, tuple({"name": "hf", "measured_by": "us", "kl": kl} for kl in found)))
        return SimpleNamespace(products=[SimpleNamespace(bytes=1 << 20)])

    monkeypatch.setattr(trained, "straight", lambda place: place.folder)
    monkeypatch.setattr(api, "merge_and_export", exported)
    return found


def test_near_is_held_far_and_unmeasured_are_not(tmp_path: Path, kls: list[float]) -> None:
    assert broken(export.PROOF, tmp_path).said == "written, and nothing was measured"
    kls.append(0.001)
    assert holds(export.PROOF, tmp_path).measured["kl"] == 0.001
    kls.append(0.02)
    broken(export.PROOF, tmp_path)
