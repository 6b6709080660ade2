"""kill -9 at any moment: the run goes on from the last step that was published, and ends as if nothing had been."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import disk
from qlora.disk import sha256_file
from qlora.events import Recorder
from qlora.model.identity import Fingerprints
from qlora.saving import Saving
from qlora.training import checkpoint
from qlora.training.checkpoint import RunState
from tests.faults.cases import EVERY, SETTINGS, last_hashes, tripwire
from tests.faults.forks import Warm, finished, fork, in_child, warm
from tests.runs import write_recipe
from tests.training.cases import ABOUT, optimizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs fork")]

KILLS = 100 // EVERY  # QLORA_TEST_EVERY=1: a hundred
SAVING = {"every_steps": 1, "keep": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("kill"), llama)


def test_random_kills(place: Path, tmp_path: Path) -> None:
    """One long run, killed KILLS times while it steps, evaluates and saves; each process goes on from the last one."""
    steps = 3 * KILLS
    ready = warm(place, *SETTINGS, f"train.max_steps={steps}", "train.optimizer=adamw_8bit")
    began = time.monotonic()
    finished(in_child(ready, tmp_path / "straight", **SAVING))
    step_seconds = (time.monotonic() - began) / steps
    wanted = last_hashes(tmp_path / "straight", steps)
    chance = random.Random(20)
    published, resumed_exactly, killed = 0, 0, 0
    folder = tmp_path / "killed"
    while killed < KILLS:
        child = in_child(ready, folder, **SAVING)
        first = child.wait_for("saved checkpoint")
        assert first is not None, child.rest()
        # Within two steps of this machine: in a fixed time a fast one does many, and ends before its last kill.
        time.sleep(chance.random() * 2 * step_seconds)
        child.kill()
        code = child.wait()
        said = [first, *child.rest()]
        steps_saved = [int(line.split()[2]) for line in said if line.startswith("saved checkpoint")]
        # The process before this one had published `published`: this one began right after it, or it lost something.
        assert steps_saved[0] == published + 1, (published, steps_saved)
        resumed_exactly += 1
        killed += code == -signal.SIGKILL
        published = newest_step(folder)
        assert published >= max(steps_saved), "older than what was published"
        if code == 0 or published >= steps - 1:
            break
    assert killed == KILLS and resumed_exactly == KILLS, (killed, resumed_exactly, published)
    finished(in_child(ready, folder, **SAVING))
    assert last_hashes(folder, steps) == wanted
    assert not [path for path in (folder / "tiny").rglob(".*") if path.name != ".lock"]


def newest_step(folder: Path) -> int:
    """The newest checkpoint that verifies, found without changing anything."""
    found = sorted((folder / "tiny" / "checkpoints").glob("step-*"), reverse=True)
    return next(int(path.name[5:]) for path in found if disk.verify_folder(path) is None)


# --- at each call of disk.py -----------------------------------------------------------------------------------------


def watched(ready: Warm, folder: Path, at: int, counts: Path | None = None) -> Any:
    def work(say: Callable[[str], None]) -> None:
        with tripwire(at) as seen:
            ready.train(folder, say, every_steps=1, keep=1)
        if counts:
            counts.write_text(str(len(seen)))

    return fork(work)


def test_a_kill_at_any_call(place: Path, tmp_path: Path) -> None:
    """Two steps, each saved; the second replaces the adapter of the first and removes its checkpoint."""
    settings = (*SETTINGS, "eval.every_steps=1", "train.max_steps=2", "train.optimizer=adamw")
    ready = warm(place, *settings)
    finished(watched(ready, tmp_path / "straight", 0, tmp_path / "count"))
    wanted = last_hashes(tmp_path / "straight", 2)
    adapter = sha256_file(tmp_path / "straight" / "tiny" / "adapter" / "adapter_model.safetensors")
    calls = int((tmp_path / "count").read_text())
    assert calls > 60
    recovered = 0
    for at in range(1, calls + 1, EVERY):
        folder = tmp_path / f"at{at}"
        child = watched(ready, folder, at)
        assert child.wait() == -signal.SIGKILL, (at, child.rest())
        finished(in_child(ready, folder, every_steps=1, keep=1))
        assert last_hashes(folder, 2) == wanted, at
        assert sha256_file(folder / "tiny" / "adapter" / "adapter_model.safetensors") == adapter, at
        leftovers = [path.name for path in (folder / "tiny").rglob(".*") if path.name != ".lock"]
        assert not leftovers, (at, leftovers)
        recovered += 1
        shutil.rmtree(folder)
    assert recovered == len(range(0, calls, EVERY))
    print(f"killed at {recovered} of {calls} calls: all recovered")


def test_a_kill_at_any_call_of_the_thread_loses_that_state_alone(tmp_path: Path) -> None:
    """State 2 is written by the thread while the main one goes on: state 1 stands until 2 does, and nothing is half."""

    def saved(folder: Path, step: int, at: int = 0) -> int:
        made, recorder = optimizer(), Recorder()
        saving = Saving(folder, recorder)
        publish = checkpoint.snapshot(folder, RunState(step=step), made, Fingerprints("b", "d"), 1, ABOUT)
        with tripwire(at) as seen, saving:
            saving.begin(step, publish)
        assert saving.saved_step == step, recorder.events
        return len(seen)

    (tmp_path / "straight").mkdir()
    saved(tmp_path / "straight", 1)
    calls = saved(tmp_path / "straight", 2)
    assert calls > 15
    outcomes = []
    for at in range(1, calls + 1):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        saved(folder, 1)
        child = fork(lambda _, folder=folder, at=at: saved(folder, 2, at) and None)  # type: ignore[misc]
        assert child.wait() == -signal.SIGKILL, (at, child.rest())
        disk.sweep_leftovers(folder / "checkpoints")
        found = checkpoint.newest(folder, Recorder())
        assert found is not None and not list(folder.glob("checkpoints/*.broken*")), at
        outcomes.append(found.state.step)
        saved(folder, 3)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000003"], at
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}  # 2 from its one rename on


def test_a_kill_between_the_two_renames_loses_neither_folder(tmp_path: Path) -> None:
    """A folder that is replaced is away for a moment: whichever of the two is whole comes back."""
    disk.publish_folder(tmp_path / "adapter", lambda folder: (folder / "a").write_text("old") and None)

    def replace_it(_: Any) -> None:
        real = os.rename

        def rename(source: Any, target: Any) -> None:
            if Path(target).name == "adapter":
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.rename = rename
        disk.publish_folder(tmp_path / "adapter", lambda folder: (folder / "a").write_text("new") and None)

    assert fork(replace_it).wait() == -signal.SIGKILL
    assert not (tmp_path / "adapter").exists()
    disk.sweep_leftovers(tmp_path)
    assert (tmp_path / "adapter" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
