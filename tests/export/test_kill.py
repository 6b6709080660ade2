"""A merge that is killed at any moment leaves the final name absent or whole, and the next run finishes it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora import disk
from qlora.cli import common
from qlora.events import Recorder
from qlora.export import staging
from qlora.export.hashed_file import HashedFile
from qlora.stop import StopRequest
from tests.export.cases import KINDS, merge_of, of_peft, trained
from tests.export.hf_folder import write_hf
from tests.families import make_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
    pytest.mark.filterwarnings("ignore"),
]
KILLS = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of eight layers with an adapter, and the folder that an undisturbed merge makes of them."""
    folder = tmp_path_factory.mktemp("work")
    make_base("llama", folder / "base", overrides={"num_hidden_layers": 8})
    trained(folder / "base", folder / "adapter", KINDS["plain"])
    write_hf(merge_of(folder / "base", folder / "adapter"), folder / "calm", Recorder())
    return folder


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point to go on from every 64 KiB, and each block a millisecond longer, so that most kills meet the writing."""
    monkeypatch.setattr(staging, "RESTART_BYTES", 64 << 10)
    append = HashedFile.append
    monkeypatch.setattr(HashedFile, "append", lambda self, data: (time.sleep(0.001), append(self, data))[1])


def child(job: Callable[[], object]) -> int:
    """`job` in a forked process, which has everything imported already and ends without a word."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            job()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    return number


def status_of(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def merge(work: Path, out: Path, adapter: str = "adapter") -> None:
    write_hf(merge_of(work / "base", work / adapter), out, Recorder())


def reached(out: Path) -> int:
    """The newest item from which a later run may go on."""
    journal = out.with_name(f".{out.name}.part") / "journal.json"
    return json.loads(journal.read_text())["points"][-1]["item"] if journal.is_file() else 0


def manifest(folder: Path) -> dict[str, object]:
    assert disk.verify_folder(folder) is None
    return json.loads((folder / disk.MANIFEST).read_text())


def wait_for_a_point(out: Path) -> None:
    """Until a later run may go on from something; a child that never gets there must not hold the tests."""
    patience = time.monotonic() + 60
    while reached(out) == 0:
        assert time.monotonic() < patience
        time.sleep(0.005)


def test_kills_at_any_moment(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = manifest(work / "calm")
    seconds = 1e9
    for _ in range(3):
        began = time.monotonic()
        assert status_of(child(lambda: merge(work, out))) == 0
        seconds = min(seconds, time.monotonic() - began)
        assert manifest(out) == expected
        shutil.rmtree(out)
    moments = random.Random(11)
    went_on = killed = 0
    for kill in range(3 * KILLS):
        if killed >= KILLS and went_on >= KILLS // 4:
            break
        number = child(lambda: merge(work, out))
        # Half of them at any moment, half at any moment after the first point to go on from: on a busy machine the time
        # before that point varies by more than the whole merge takes on an idle one.
        patience = time.monotonic() + 10 * seconds
        while kill % 2 and not reached(out) and not out.exists() and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, seconds / (4 if kill % 2 else 1)))
        os.kill(number, signal.SIGKILL)
        was_killed = status_of(number) == -signal.SIGKILL
        killed += was_killed
        seconds *= 1 if was_killed else 0.7  # it was measured beside other work, which is over
        if out.exists():
            assert manifest(out) == expected
            shutil.rmtree(out)
        went_on += reached(out) > 0
        assert status_of(child(lambda: merge(work, out))) == 0
        assert manifest(out) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)
    assert killed >= KILLS * 3 // 4 and went_on >= KILLS // 4, (killed, went_on)


def test_many_kills_of_one_merge_come_to_an_end(work: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "out", random.Random(12)
    steps = []
    for _ in range(KILLS):
        number = child(lambda: merge(work, out))
        time.sleep(moments.uniform(0.1, 0.4))
        os.kill(number, signal.SIGKILL)
        if status_of(number) == 0 or out.exists():
            break
        steps.append(reached(out))
    assert steps == sorted(steps)
    merge(work, out)
    assert manifest(out) == manifest(work / "calm")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_finished(work: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"

    def stoppable() -> None:
        stop = StopRequest()
        with common.Signals(stop, common.Screen(None, stop)):
            merge(work, out)

    process = child(lambda: common.run(stoppable))
    wait_for_a_point(out)
    os.kill(process, number)
    assert status_of(process) == 128 + number
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == [".out.part"]
    assert reached(out) > 0
    merge(work, out)
    assert manifest(out) == manifest(work / "calm")


def test_another_adapter_begins_anew(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    of_peft(work / "base", work / "other")
    number = child(lambda: merge(work, out))
    wait_for_a_point(out)
    os.kill(number, signal.SIGKILL)
    status_of(number)
    merge(work, out, "other")
    merge(work, tmp_path / "calm", "other")
    assert manifest(out) == manifest(tmp_path / "calm") != manifest(work / "calm")
