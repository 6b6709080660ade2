"""What is remembered of runs on a GPU, and the correction that comes of it."""

from __future__ import annotations

import json
import os
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


def proofs(*settings: tuple[object, object], device: str = "RTX 3060", **more: object) -> dict[str, object]:
    """The JSON of proofs in which the memory of these settings was said and measured."""
    measured: dict[str, object] = {}
    for number, (said, found) in enumerate(settings):
        measured |= {f"{number}: predicted_tensor_bytes": said, f"{number}: measured_tensor_bytes": found}
    memory = {"name": "memory", "promise": "p", "outcome": "held", "measured": measured}
    return {"format": 1, "hardware": {"device": device}, "versions": {"torch": "2.13"}, "proofs": [memory], **more}


def test_proofs_count_as_one_run_on_their_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    kept = calibration.keep(proofs((100, 101), (100, 104), (100, 99)))
    assert kept is not None and kept.parent == tmp_path / "proofs"
    assert calibration.correction("RTX 3060") == Correction(1.04, 1)
    assert calibration.correction("RTX 4090") == Correction()
    (tmp_path / "proofs" / "a-friends.json").write_text(json.dumps(proofs((100, 102))))
    calibration.add(Pair("RTX 3060", "2.13", 100, 106))
    assert calibration.correction("RTX 3060").runs == 3


def test_proofs_without_a_card_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    assert calibration.keep(proofs(device="cpu")) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 500,
        json.dumps(proofs((0, 100))),
        json.dumps(proofs((100, "much"))),
        json.dumps(proofs((100, None))),
        json.dumps(proofs((True, 100))),
        json.dumps(proofs((100, 100), format=2)),
        json.dumps(proofs((100, 100), device="x" * 300)),
        json.dumps(proofs((100, 100), rest="x" * 600_000)),
        json.dumps(proofs((100, 10**30))),
        json.dumps(proofs((100, 100), proofs=7)),
    ],
)
def test_a_strangers_file_is_bounded_and_checked(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    (tmp_path / "proofs").mkdir()
    (tmp_path / "proofs" / "x.json").write_text(content)
    assert calibration.correction("RTX 3060") == Correction()


def test_neither_links_nor_more_than_the_newest_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    folder = tmp_path / "proofs"
    folder.mkdir()
    for number in range(calibration.MAX_PROOFS + 5):
        file = folder / f"{number}.json"
        file.write_text(json.dumps(proofs((100, 90 if number < 5 else 110))))
        os.utime(file, (number, number))
    assert calibration.correction("RTX 3060") == Correction(1.1, calibration.MAX_PROOFS)
    for file in folder.iterdir():
        file.unlink()
    (tmp_path / "elsewhere").write_text(json.dumps(proofs((100, 110))))
    (folder / "x.json").symlink_to(tmp_path / "elsewhere")
    assert calibration.correction("RTX 3060") == Correction()
