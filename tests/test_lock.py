"""Two runs never share a folder; a lock that its holder left behind is taken over."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlora import lock, run_folder
from qlora.errors import RunFolderError
from tests.runs import run_dir, train, write_recipe

HOLD = (
    "import sys\nfrom pathlib import Path\nfrom qlora import lock\nheld = lock.acquire(Path(sys.argv[1]))\n"
    "print('held', flush=True)\nsys.stdin.read()\n"
)


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the folder's lock until its stdin closes or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_is_refused_and_a_dead_holder_forgotten(tmp_path: Path) -> None:
    other = holder(tmp_path)
    for take in (lock.acquire, lock.check_free):
        with pytest.raises(RunFolderError, match=f"a run is under way in it .process {other.pid} on"):
            take(tmp_path)
    other.kill()
    other.wait()
    assert json.loads((tmp_path / lock.LOCK_FILE).read_text())["pid"] == other.pid  # it left its name behind
    lock.check_free(tmp_path)
    held = lock.acquire(tmp_path)
    assert json.loads((tmp_path / lock.LOCK_FILE).read_text())["pid"] == os.getpid()
    held.release()
    held.release()
    lock.acquire(tmp_path).release()


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], taken: bool
) -> None:
    without_locks(monkeypatch)
    me = {"pid": os.getpid(), "started": lock.start_of(os.getpid()), "host": socket.gethostname()}
    (tmp_path / lock.LOCK_FILE).write_text(json.dumps(me | changes))
    if taken:
        with pytest.raises(RunFolderError, match="under way"):
            lock.acquire(tmp_path)
    else:
        lock.acquire(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\0" * 5000])
def test_a_broken_lock_file_stops_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / lock.LOCK_FILE).write_text(text)
    lock.acquire(tmp_path).release()


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
    with pytest.raises(RunFolderError, match="under way"):
        run_folder.claim(tmp_path / "run", "new")
    other.kill()
    other.wait()
