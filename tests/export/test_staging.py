"""Folders of artifacts under way: whole or absent, gone on with after a kill, given up after an error."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from qlora import disk, lock
from qlora.errors import ExportError, StoppedBySignal, TargetTaken
from qlora.export import staging
from qlora.export.hashed_file import HashedFile
from qlora.export.staging import StagedExport
from tests.export.staged import WORK, Killed, content, fill, piece


def killed(finals: dict[str, Path], until: int, work: dict[str, str] = WORK) -> int:
    """A run that dies in the middle of an item; returns where it had begun."""
    staged = StagedExport.open(finals, work, 1000)
    with pytest.raises(Killed):
        fill(staged, tuple(finals), until=until)
    staged._wait()
    for folder in staged._folders.values():
        folder.lock.release()
    return staged.start


def finished(finals: dict[str, Path], work: dict[str, str] = WORK) -> int:
    with StagedExport.open(finals, work, 1000) as staged:
        fill(staged, tuple(finals))
        for key in finals:
            staged.publish(key)
        return staged.start


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RESTART_BYTES", 2500)


def test_an_artifact_appears_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    assert finished({"hf": tmp_path / "sub" / "out"}) == 0
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["out"]
    out = tmp_path / "sub" / "out"
    assert disk.verify_folder(out) is None
    assert sorted(content(out)) == ["config.json", "manifest.json", "part0.bin", "part1.bin", "part2.bin"]
    assert content(out)["part0.bin"] == b"".join(map(piece, range(1, 8)))
    entry = json.loads((out / "manifest.json").read_text())["files"]["part1.bin"]
    assert entry["sha256"] == disk.sha256_file(out / "part1.bin")


def test_a_killed_run_is_gone_on_with_and_gives_the_same_bytes(tmp_path: Path) -> None:
    finished({"a": tmp_path / "calm", "b": tmp_path / "calm2"})
    finals = {"a": tmp_path / "x", "b": tmp_path / "y"}
    starts = [killed(finals, until) for until in (6, 11, 12, 19)]
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] > 8
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()
    assert finished(finals) > starts[-1]
    assert content(tmp_path / "x") == content(tmp_path / "y") == content(tmp_path / "calm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "calm2", "x", "y"]


def test_other_work_begins_anew(tmp_path: Path) -> None:
    killed({"a": tmp_path / "x"}, 12)
    assert killed({"a": tmp_path / "x"}, 12, {**WORK, "adapter": "b"}) == 0
    assert killed({"a": tmp_path / "x"}, 15) == 0


def test_one_artifact_of_several_is_gone_on_with_alone(tmp_path: Path) -> None:
    killed({"a": tmp_path / "x", "b": tmp_path / "y"}, 12)
    assert finished({"a": tmp_path / "x"}) > 4
    assert killed({"a": tmp_path / "x", "b": tmp_path / "y"}, 12) == 0, "b alone has come so far"


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "no journal", "broken journal", "a folder is gone"])
def test_what_is_damaged_begins_anew(tmp_path: Path, damage: str) -> None:
    killed({"a": tmp_path / "x"}, 12)
    root = tmp_path / ".x.part"
    file = root / "files" / "part0.bin"
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "other bytes":
        file.write_bytes(b"!" + file.read_bytes()[1:])
    elif damage == "no journal":
        (root / "journal.json").unlink()
    elif damage == "broken journal":
        (root / "journal.json").write_text('{"identity": 3')
    else:
        file.unlink()
    assert finished({"a": tmp_path / "x"}) == 0
    assert disk.verify_folder(tmp_path / "x") is None


def test_a_journal_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    killed({"a": tmp_path / "x"}, 12)
    file = tmp_path / ".x.part" / "journal.json"
    journal = json.loads(file.read_text())
    journal["points"][-1]["files"] = {"../../thesis.tex": [0, disk.sha256_text()]}
    file.write_text(json.dumps(journal))
    assert finished({"a": tmp_path / "x"}) == 0
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("error", [ValueError("ours"), ExportError("worse than --max-kl", "…"), OSError(errno.EIO, "")])
def test_an_error_leaves_nothing_and_the_old_artifact(tmp_path: Path, error: Exception) -> None:
    finished({"a": tmp_path / "x"})
    before = content(tmp_path / "x")
    with pytest.raises(type(error)), StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
        fill(staged, ("a",), items=9)
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and content(tmp_path / "x") == before


@pytest.mark.parametrize("error", [StoppedBySignal("stopped", "", signal.SIGTERM), KeyboardInterrupt()])
def test_a_signal_keeps_every_finished_item(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
        fill(staged, ("a",), items=13)
        staged.append("a", "part1.bin", b"half an item")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == [".x.part"]
    assert finished({"a": tmp_path / "x"}) == 13
    finished({"a": tmp_path / "calm"})
    assert content(tmp_path / "x") == content(tmp_path / "calm")


def test_a_signal_between_two_artifacts_keeps_the_second(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        StagedExport.open({"a": tmp_path / "x", "b": tmp_path / "y"}, WORK, 0) as staged,
    ):
        fill(staged, ("a", "b"))
        staged.publish("a")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == [".y.part", "x"]
    assert finished({"b": tmp_path / "y"}) == 20


def test_a_full_disk_is_an_error_of_two_lines_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = HashedFile.append

    def full(self: HashedFile, data: bytes) -> None:
        if self.size > 4000:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, data)

    monkeypatch.setattr(HashedFile, "append", full)
    with pytest.raises(ExportError, match="the disk is full") as caught:
        finished({"a": tmp_path / "x", "b": tmp_path / "y"})
    assert "`out`" in caught.value.hint and caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_small_disk_is_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(ExportError, match=r"needs 2.0 GiB, 0.0 GiB are free"):
        StagedExport.open({"a": tmp_path / "x"}, WORK, 2 << 30)
    assert not list(tmp_path.iterdir())


def test_what_is_written_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed({"a": tmp_path / "x"}, 12)
    monkeypatch.setattr(disk, "free_bytes", lambda path: staging.SPARE_BYTES + 500)
    with pytest.raises(ExportError):
        StagedExport.open({"a": tmp_path / "x"}, WORK, 1 << 20)
    kept = sum(path.stat().st_size for path in (tmp_path / ".x.part" / "files").iterdir())
    with StagedExport.open({"a": tmp_path / "x"}, WORK, kept + 400) as staged:
        assert staged.start > 4 and kept > 4000


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with StagedExport.open({"b": tmp_path / "y", "a": tmp_path / "x"}, WORK, 0) as staged:
        with pytest.raises(ExportError, match=rf"another process \({os.getpid()}\) is writing it"):
            StagedExport.open({"c": tmp_path / "z", "a": tmp_path / "x"}, WORK, 0)
        assert not (tmp_path / ".z.part").exists()
        fill(staged, ("a", "b"))
        staged.publish("a")
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "what was not published is removed"


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    root = tmp_path / ".x.part"
    for text in ('{"pid": 4194305, "started": "1", "host": "here"}', ""):  # "": it died before it wrote its name
        root.mkdir()
        (root / "lock").write_text(text)
        assert finished({"a": tmp_path / "x"}) == 0


def test_a_folder_that_its_last_writer_removes_in_this_moment_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, take = tmp_path / ".x.part", lock._take
    rounds: list[int] = []

    def late(handle: int) -> None:
        rounds.append(handle)
        if len(rounds) == 1:
            disk.discard(root)
        take(handle)

    monkeypatch.setattr(lock, "_take", late)
    assert finished({"a": tmp_path / "x"}) == 0 and len(rounds) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot write there"):
        StagedExport.open({"a": tmp_path / "file" / "x"}, WORK, 0)


def test_one_artifact_is_given_up_and_the_others_published(tmp_path: Path) -> None:
    with StagedExport.open({"a": tmp_path / "x", "b": tmp_path / "y"}, WORK, 0) as staged:
        fill(staged, ("a", "b"))
        staged.discard("a")
        assert staged.publish("b").bytes == sum(len(piece(item)) for item in range(1, 21)) + 2
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_arrays_of_any_shape_are_appended_as_their_bytes(tmp_path: Path) -> None:
    with StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
        staged.append("a", "f", np.arange(12, dtype=np.uint8).reshape(3, 4))
        staged.append("a", "f", np.zeros((0, 4), np.uint8))
        staged.append("a", "f", memoryview(b"ab"))
        staged.publish("a")
    assert (tmp_path / "x" / "f").read_bytes() == bytes(range(12)) + b"ab"


def test_points_are_flushed_before_they_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, write = HashedFile.sync, disk.write_atomic
    monkeypatch.setattr(HashedFile, "sync", lambda self: (calls.append(self.path.name), sync(self))[1])
    monkeypatch.setattr(disk, "write_atomic", lambda path, data: (calls.append(path.name), write(path, data))[1])
    killed({"a": tmp_path / "x"}, 6)
    assert calls == ["part.json", "part0.bin", "journal.json"]


def test_an_earlier_artifact_goes_and_a_changed_one_is_set_aside(tmp_path: Path) -> None:
    for text in (None, None, "[]"):  # of the size that it had
        if text:
            (tmp_path / "x" / "config.json").write_text(text)
        with StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
            fill(staged, ("a",))
            size, aside = staged.publish("a", {"of": {"adapter": "tiny"}})
        assert size > 20_000 and (aside is not None) is bool(text)
    assert disk.read_manifest(tmp_path / "x")["of"] == {"adapter": "tiny"}
    assert aside == (tmp_path / "x.1", sum(map(len, content(tmp_path / "x.1").values())))
    assert (tmp_path / "x.1" / "config.json").read_text() == "[]"


def test_what_was_laid_there_meanwhile_stays_and_so_does_the_work(tmp_path: Path) -> None:
    """Hours may lie between the look at the door and the end; once it is moved away, the rest takes seconds."""
    with pytest.raises(TargetTaken), StagedExport.open({"a": tmp_path / "x"}, WORK, 0) as staged:
        fill(staged, ("a",))
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "mine").write_text("mine")
        staged.publish("a")
    assert content(tmp_path / "x") == {"mine": b"mine"}
    (tmp_path / "x").rename(tmp_path / "elsewhere")
    assert finished({"a": tmp_path / "x"}) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "x"]


def test_a_hidden_folder_of_somebody_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".x.part" / "files").mkdir(parents=True)
    (tmp_path / ".x.part" / "files" / "mine").write_text("mine")
    for work in (
        lambda: StagedExport.open({"a": tmp_path / "x"}, WORK, 0),
        lambda: staging.check_disk([tmp_path / "x"], 0),
    ):
        with pytest.raises(ExportError, match="is in the way of x"):
            work()
    assert content(tmp_path / ".x.part" / "files") == {"mine": b"mine"}
    (tmp_path / ".x.part" / "files" / "mine").unlink()
    (tmp_path / ".x.part" / "files").rmdir()
    assert finished({"a": tmp_path / "x"}) == 0, "an empty one is nobody's"


def test_an_artifact_that_a_kill_left_without_its_name_comes_back(tmp_path: Path) -> None:
    finished({"a": tmp_path / "x"})
    (tmp_path / "x").rename(tmp_path / ".x.swap-qlora-4194305-00000000")
    (tmp_path / "..x.part.old-qlora-4194305-00000000").mkdir()
    with pytest.raises(KeyboardInterrupt), StagedExport.open({"a": tmp_path / "x"}, WORK, 0):
        assert disk.verify_folder(tmp_path / "x") is None
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.part", "x"]


def test_the_disk_is_looked_at_with_what_will_be_replaced_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one stands before the old one goes: both need room."""
    finished({"a": tmp_path / "x"})
    old = sum(map(len, content(tmp_path / "x").values()))
    monkeypatch.setattr(disk, "free_bytes", lambda path: staging.SPARE_BYTES + old - 1)
    with pytest.raises(ExportError, match="are free"):
        StagedExport.open({"a": tmp_path / "x"}, WORK, old)
