"""What is remembered of runs on a GPU, and the correction that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.memory import calibration
from qlora.memory.calibration import Correction, Pair


def test_calibration_is_the_median_of_what_is_plausible(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    assert calibration.correction("RTX 4090") == Correction()
    for measured in (100, 104, 108, 500):  # the last one: another program was on the card
        calibration.add(Pair("RTX 4090", "2.13", 100, measured))
    calibration.add(Pair("RTX 3060", "2.13", 100, 90))
    assert calibration.correction("RTX 4090") == Correction(1.04, 3, pytest.approx(1.08 / 1.04 - 1))


@pytest.mark.parametrize(
    "content", ["", "{", "[1, {}]", '{"a": 1}', '[{"gpu": "x", "torch": "y", "predicted_bytes": 0}]']
)
def test_a_broken_calibration_file_is_as_good_as_none(
    content: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    calibration.path().write_text(content)
    assert calibration.correction("x") == Correction()
    calibration.add(Pair("x", "2.13", 100, 101))
    assert calibration.correction("x").runs == 1


def test_only_recent_runs_count_and_old_ones_are_forgotten(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    for number in range(calibration.KEPT_PAIRS + 10):
        old = number < calibration.KEPT_PAIRS + 10 - calibration.RECENT_PAIRS
        calibration.add(Pair("x", "2.13", 100, 90 if old else 110))
    assert calibration.correction("x") == Correction(1.1, calibration.RECENT_PAIRS)
    assert len(json.loads(calibration.path().read_text())) == calibration.KEPT_PAIRS


def test_a_cache_that_cannot_be_written_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    calibration.add(Pair("x", "2.13", 100, 101))
    assert calibration.correction("x") == Correction()
