"""Where a thread behind an export fails: it leaves what an export in one thread leaves, and no thread outlives it."""

from __future__ import annotations

import errno
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from qlora import disk
from qlora.errors import ExportError, StoppedBySignal
from qlora.export import staging
from qlora.export.staging import StagedExport
from qlora.export.write_blocks import Block
from tests.export.staged import WORK, content, fill, piece


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RESTART_BYTES", 2500)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("sha256", "write", "flush"))]


def fail_writes(monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> list[int]:
    """Have the writing of blocks fail from one of them on; returns what counts them."""
    write, calls = Block.write, list[int]()

    def failing(block: Block, file: Any) -> None:
        calls.append(block.used)
        if len(calls) >= number:
            raise OSError(code, "No space left on device")
        write(block, file)

    monkeypatch.setattr(Block, "write", failing)
    return calls


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_disk_that_fills_up_in_the_thread_that_writes_ends_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = fail_writes(monkeypatch, number, errno.ENOSPC)
    with (
        pytest.raises(ExportError, match="the disk is full") as caught,
        StagedExport.open({"a": tmp_path / "x", "b": tmp_path / "y"}, WORK, 0) as staged,
    ):
        fill(staged, ("a", "b"))
    assert "`out`" in caught.value.hint and len(calls) >= number
    assert not list(tmp_path.iterdir()) and not threads()


@pytest.mark.parametrize("error", [StoppedBySignal("stopped", "", signal.SIGTERM), KeyboardInterrupt(), ValueError()])
def test_no_thread_outlives_an_export_that_is_left(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
        fill(staged, ("a",), items=13)
        staged.append("a", "part1.bin", b"half an item")
        raise error
    assert not threads()


def test_a_point_whose_bytes_could_not_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal keeps the older point: the newer one would be of bytes that are not there."""
    stop = StoppedBySignal("stopped", "", signal.SIGTERM)
    with pytest.raises(StoppedBySignal), StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
        fill(staged, ("a",), items=4)
        staged._wait()
        fail_writes(monkeypatch, 1, errno.EIO)
        staged.append("a", "part0.bin", piece(5))
        staged.checkpoint(5)
        raise stop
    points = json.loads((tmp_path / ".x.part" / "journal.json").read_text())["points"]
    assert points and max(point["item"] for point in points) < 5
    monkeypatch.undo()
    monkeypatch.setattr(staging, "RESTART_BYTES", 2500)
    with StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
        assert 0 < staged.start < 5
        fill(staged, ("a",))
        staged.publish("a")
    assert disk.verify_folder(tmp_path / "x") is None
    assert content(tmp_path / "x")["part0.bin"] == b"".join(map(piece, range(1, 8)))


def test_whoever_asks_for_the_folder_finds_in_it_what_was_appended(tmp_path: Path) -> None:
    with StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
        for number in range(3):
            staged.append("a", "f", piece(number))
            found = (staged.folder("a") / "f").read_bytes()
            assert found == b"".join(map(piece, range(number + 1)))
