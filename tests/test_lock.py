"""Two processes never share a folder; a lock that its holder left behind is taken over."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlora import lock, run_folder
from qlora.errors import RunFolderError
from tests.runs import run_dir, train, write_recipe

HOLD = (
    "import sys\nfrom pathlib import Path\nfrom qlora import lock\ntaken = lock.acquire(Path(sys.argv[1]) / '.lock')\n"
    "print('taken', flush=True)\nsys.stdin.read()\n"
)


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the folder's lock until its stdin closes or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    return process


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / run_folder.LOCK_FILE


def test_a_held_folder_is_refused_and_a_dead_holder_forgotten(tmp_path: Path, file: Path) -> None:
    other = holder(tmp_path)
    for take in (lock.acquire, lock.check_free):
        with pytest.raises(lock.LockHeld) as caught:
            take(file)
        assert caught.value.holder is not None
        assert (caught.value.holder.pid, caught.value.holder.host) == (other.pid, socket.gethostname())
    other.kill()
    other.wait()
    assert json.loads(file.read_text())["pid"] == other.pid  # it left its name behind
    lock.check_free(file)
    taken = lock.acquire(file)
    assert json.loads(file.read_text())["pid"] == os.getpid()
    taken.release()
    taken.release()
    assert file.read_text() == ""
    lock.acquire(file).release()


@pytest.mark.skipif(os.name == "nt", reason="an open file can be neither removed nor renamed there")
@pytest.mark.parametrize("change", ["removed", "moved with its folder", "replaced"])
def test_a_file_that_lost_its_name_before_it_was_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """An export removes its folder, --fresh renames a run's: who had opened that file holds nothing by it."""
    folder = tmp_path / "run"
    folder.mkdir()
    file = folder / ".lock"
    take, opened = lock._take, []

    def late(handle: int) -> None:
        opened.append(handle)
        if len(opened) == 1 and change == "removed":
            file.unlink()
        elif len(opened) == 1:
            folder.rename(tmp_path / "run.1")
            folder.mkdir()
            if change == "replaced":
                file.write_text("")
        take(handle)

    monkeypatch.setattr(lock, "_take", late)
    taken = lock.acquire(file)
    monkeypatch.undo()
    assert len(opened) == 2 and json.loads(file.read_text())["pid"] == os.getpid()
    with pytest.raises(lock.LockHeld):
        lock.acquire(file)
    taken.release()


@pytest.mark.skipif(os.name == "nt", reason="an open file can be neither removed nor renamed there")
def test_a_lock_is_lost_with_its_file(tmp_path: Path, file: Path) -> None:
    assert lock.is_held(file) is None, "nobody has taken it"
    taken = lock.acquire(file)
    assert lock.is_held(file)
    text = file.read_text()
    file.rename(tmp_path / "elsewhere")
    file.write_text(text)  # a copy of it, as a folder that is copied has one
    assert lock.is_held(file) is False
    file.write_text(text.replace(str(os.getpid()), "1"))
    assert lock.is_held(file) is False, "another process has it"
    os.replace(tmp_path / "elsewhere", file)
    assert lock.is_held(file)
    taken.release()
    assert lock.is_held(file) is None


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot lock."""
    import fcntl

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.skipif(os.name == "nt", reason="flock")
@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),  # this very process, which runs
        ({"started": "1"}, False),  # another process had this number
        ({"pid": 2**22 + 1}, False),  # no such process
        ({"host": "elsewhere"}, True),  # nobody can tell from here
    ],
)
def test_where_files_cannot_be_locked_the_holders_name_counts(
    file: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], taken: bool
) -> None:
    without_locks(monkeypatch)
    me = {"pid": os.getpid(), "started": lock.start_of(os.getpid()), "host": socket.gethostname()}
    file.write_text(json.dumps(me | changes))
    if taken:
        with pytest.raises(lock.LockHeld):
            lock.acquire(file)
    else:
        lock.acquire(file).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "4711", '{"pid": "x"}', "\0" * 5000])
def test_a_broken_lock_file_stops_nobody(file: Path, text: str) -> None:
    file.write_text(text)
    lock.check_free(file)
    taken = lock.acquire(file)
    assert json.loads(file.read_text())["pid"] == os.getpid()
    with pytest.raises(lock.LockHeld):
        lock.check_free(file)
    taken.release()


def test_a_lock_file_is_json_wherever_its_text_begins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows byte 0 is the locked one: others read behind it, and older versions take the space for JSON's own."""
    monkeypatch.setattr(lock, "_TEXT_START", 1)
    taken = lock.acquire(file)
    assert file.read_text().startswith(" {") and json.loads(file.read_text())["pid"] == os.getpid()
    with pytest.raises(lock.LockHeld) as caught:
        lock.check_free(file)
    assert caught.value.holder is not None and caught.value.holder.pid == os.getpid()
    taken.release()


@pytest.mark.skipif(os.name == "nt", reason="nobody can be asked there")
def test_processes_that_run_and_that_do_not() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert lock.is_running(os.getpid()) and not lock.is_running(gone.pid)
    assert lock.is_running(1), "another user's"
    assert lock.is_running(1 << 70), "no number of a process: nobody can tell"


def test_a_running_run_is_left_alone_by_every_mode(tmp_path: Path, llama: Path) -> None:
    """--fresh would rename the folder under it, --resume would write into it."""
    recipe = write_recipe(tmp_path, llama)
    settings = ("train.max_steps=2", "train.batch_size=2", "data.max_length=96", "eval.samples=0")
    train(recipe, *settings, stop_after=1)
    other = holder(run_dir(recipe))
    before = sorted(path.name for path in run_dir(recipe).parent.iterdir())
    for mode in ("new", "resume", "fresh"):
        with pytest.raises(RunFolderError, match="under way"):
            train(recipe, *settings, mode=mode)  # type: ignore[arg-type]
    assert sorted(path.name for path in run_dir(recipe).parent.iterdir()) == before
    other.kill()
    other.wait()
    train(recipe, *settings, mode="resume")
    train(recipe, *settings, mode="fresh")
    assert sorted(path.name for path in run_dir(recipe).parent.iterdir()) == ["tiny", "tiny.1"]


def test_who_comes_second_loses(tmp_path: Path) -> None:
    """Between the check and the claim another process was faster."""
    run_folder.claim(tmp_path / "run", "new").release()
    other = holder(tmp_path / "run")
    with pytest.raises(
        RunFolderError, match=rf"a run is under way in it \(process {other.pid} on {re.escape(socket.gethostname())}\)"
    ):
        run_folder.claim(tmp_path / "run", "new")
    other.kill()
    other.wait()
