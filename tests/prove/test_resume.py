"""Resume: what is compared, of folders made for it; the runs themselves are in the command's own test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import api
from qlora.events import Notice, Start
from qlora.prove import resume, trained
from qlora.training.checkpoint import folder_of
from tests.prove.cases import broken, holds

Change = Callable[[Path], None]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two runs that ended alike; what the resumed one says is in the list."""
    said: list[str] = []
    for name in ("straight", "killed"):
        end = folder_of(tmp_path / "runs" / name, trained.STEPS)
        end.mkdir(parents=True)
        for file in resume.FILES:
            (end / file).write_bytes(file.encode())
        (tmp_path / "runs" / name / "events.jsonl").write_text('{"event": "step", "peak_bytes": 5}\n')

    def go_on(recipe: Any, *, name: str, mode: str, sink: Any) -> None:
        assert (name, mode) == ("killed", "resume")
        sink.emit(Start("killed", "", "", None, "cpu", {}, 2))
        for line in said:
            sink.emit(Notice("resume", line))

    monkeypatch.setattr(trained, "straight", lambda place: place.folder / "runs" / "straight")
    monkeypatch.setattr(trained, "recipe_file", lambda place, name: place.folder / f"{name}.toml")
    monkeypatch.setattr(trained, "recipe_of", lambda file: None)
    monkeypatch.setattr(resume, "_killed", lambda *_: True)
    monkeypatch.setattr(api, "train", go_on)
    return said


def test_equal_bits_hold(tmp_path: Path, runs: list[str]) -> None:
    outcome = holds(resume.PROOF, tmp_path)
    assert outcome.measured["resumed_from_step"] == 2 and "the same bits" in outcome.said


def test_another_bit_breaks_it(tmp_path: Path, runs: list[str]) -> None:
    (folder_of(tmp_path / "runs" / "killed", trained.STEPS) / resume.FILES[1]).write_bytes(b"other")
    assert "other bits in optimizer.safetensors" in broken(resume.PROOF, tmp_path).said


def test_a_run_that_says_it_is_not_exact_breaks_it(tmp_path: Path, runs: list[str]) -> None:
    runs.append("the rest of the run is not bit for bit what it would have been: threads 1 (now 2)")
    assert "threads 1 (now 2)" in broken(resume.PROOF, tmp_path).said
