"""Disks: full, read-only, gone, slow; the small file that measures them never stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora import files
from qlora.doctor import places
from qlora.doctor.finding import Colour
from qlora.doctor.places import GIB, MIB, Place, PlaceFacts, judged


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "WRITTEN_BYTES", 2 * MIB)


def test_a_place_is_measured_where_its_folder_will_be(tmp_path: Path) -> None:
    (found,) = places.findings(Place("runs", tmp_path / "not" / "there"))
    assert found.figures["bytes_per_second"] and found.here.endswith("there") and str(tmp_path) not in found.said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_red_and_nothing_stays(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "write_all", full)
    (found,) = places.findings(Place("runs", tmp_path))
    assert found.colour == Colour.RED and "is full" in found.said and "`caches`" in found.mend
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "is read-only"),
        (errno.EACCES, "cannot be written"),
        (errno.EIO, "does not work"),
        (errno.EFBIG, "a limit"),
        (errno.ENOENT, "is gone"),
    ],
)
def test_each_refusal_is_said(number: int, said: str) -> None:
    found = judged(PlaceFacts(Place("tokens", Path("/c")), error=OSError(number, "no")))
    assert found.colour == Colour.RED and said in found.said and found.mend
    assert number in (errno.EIO, errno.EFBIG, errno.ENOENT) or "QLORA_CACHE" in found.mend


def test_a_file_in_the_place_of_a_folder_is_red(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    (found,) = places.findings(Place("runs", tmp_path / "runs" / "x"))
    assert found.colour == Colour.RED and "a file is where" in found.said and "output.dir" in found.mend
    (long,) = places.findings(Place("runs", tmp_path / ("x" * 5000)))
    assert long.colour == Colour.RED and "cannot be a folder" in long.said


@pytest.mark.parametrize(
    ("free", "speed", "colour"),
    [
        (GIB // 2, 500 * MIB, Colour.RED),
        (5 * GIB, 500 * MIB, Colour.YELLOW),
        (50 * GIB, 5 * MIB, Colour.YELLOW),
        (50 * GIB, 500 * MIB, Colour.GREEN),
        (50 * GIB, None, Colour.GREEN),
    ],
)
def test_room_and_speed_have_their_colours(free: int, speed: float | None, colour: Colour) -> None:
    assert judged(PlaceFacts(Place("runs", Path("/r")), free, 100 * GIB, speed)).colour == colour


def test_a_slow_disk_is_not_written_to_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter(range(0, 10_000, 3))
    monkeypatch.setattr(places.time, "monotonic", lambda: next(clock))
    written: list[int] = []
    monkeypatch.setattr(files, "write_all", lambda file, data: written.append(len(data)))
    places.written(tmp_path)
    assert len(written) <= 1


def test_the_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "c"))
    found = places.usual(tmp_path / "runs", None, tmp_path)
    assert [one.what for one in found] == ["runs", "tokens", "temporary"] and found[1].folder == tmp_path / "c"
