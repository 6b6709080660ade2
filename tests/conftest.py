"""What several rooms' tests share: a cache of their own, and a tiny base that is made once."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tiny models gain nothing from a second thread, and two that wait for each other lose much.
os.environ["OMP_NUM_THREADS"] = "1"  # and a child forked from threads would hang


# Files of minutes: the first to be begun, since a file's tests stay in one process and the others fill what is left.
LONGEST = (
    *("tests/test_manuals.py", "tests/test_quickstart.py", "tests/faults/test_signals.py", "tests/faults/test_kill.py"),
    # Hundreds of forks each, which cost four times as much in a worker that has grown to 3 GB.
    *("tests/faults/test_kept_bases.py", "tests/faults/test_stops.py", "tests/faults/test_disk_full.py"),
    *("tests/faults/test_resume_everywhere.py", "tests/attacks/test_fuzz.py", "tests/cli/test_verify_resume.py"),
)

# Files that simulate in nearly every test.
SIMULATING = ("memory/", "cli/test_estimate.py", "cli/test_multi_gpu_estimate.py")

# Files whose exports are verified in a process that has nothing of the test's own, as a user's are.
OF_THE_CHILD = ("test_weights.py", "test_plain_open.py", "test_quickstart.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with slow tests, then the others; within a file as it is written."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    order = {Path(__file__).parent.parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(LONGEST) + (item.path not in slow)))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("QLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


class _Frozen:
    """Whether anything is left out of searches for garbage, in the place of Python's own answer, which goes through all
    of it: a worker has millions of objects, and each model that is loaded or simulated asks several times."""

    def __init__(self) -> None:
        self.some, self.to_freeze, self.to_unfreeze = gc.get_freeze_count() > 0, gc.freeze, gc.unfreeze

    def freeze(self) -> None:
        self.to_freeze()
        self.some = True

    def unfreeze(self) -> None:
        self.to_unfreeze()
        self.some = False

    def get_freeze_count(self) -> int:
        return int(self.some)


@pytest.fixture(autouse=True, scope="session")
def _frozen() -> Iterator[None]:
    known = _Frozen()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("freeze", "unfreeze", "get_freeze_count"):
            patch.setattr(gc, name, getattr(known, name))
        yield


@pytest.fixture(autouse=True, scope="module")
def _heap_at_rest(request: pytest.FixtureRequest, _frozen: None) -> None:
    """What lives before a file's first test is left out of searches for garbage: in a run, each took half a second.

    A simulation leaves out whatever lives before it, where nobody else has. In a file of many of them all that the
    file's tests had made was searched by each: half of the time of two files of questions about memory.
    """
    file = request.path.relative_to(Path(__file__).parent).as_posix()
    if file.startswith(SIMULATING):
        gc.unfreeze()
        return
    gc.collect()
    gc.freeze()


class _Drawn:
    """In the place of the shelf of simulations, which runs without a GPU have none of: what this session has drawn."""

    def __init__(self, folder: Path) -> None:
        from qlora.memory.shelf import Shelf

        self.folder, self.key = folder, Shelf().key
        folder.mkdir(exist_ok=True)

    def get(self, key: str) -> Any:
        return pickle.loads((self.folder / key).read_bytes()) if (self.folder / key).exists() else None

    def put(self, key: str, found: Any) -> None:
        whole = self.folder / f"{key}.{os.getpid()}"
        with suppress(OSError):  # a test fills the disk
            whole.write_bytes(pickle.dumps(found))
            whole.replace(self.folder / key)


@pytest.fixture(scope="session")
def _drawn(tmp_path_factory: pytest.TempPathFactory) -> _Drawn:
    """One for all processes of a session, children and other workers."""
    base = tmp_path_factory.getbasetemp()
    return _Drawn((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "drawn")


@pytest.fixture(autouse=True, scope="module")
def _drawn_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of hundreds of runs the same two simulations, a second each, are made once (in tests/memory, each by itself)."""
    if "qlora.api" not in sys.modules:  # else files that train nothing would import torch
        yield
        return
    from qlora.memory.estimate import Estimator
    from qlora.training import memory_plan

    drawn = request.getfixturevalue("_drawn")

    def estimator(*about: Any) -> Estimator:
        made = Estimator(*about)
        made._shelf = made._shelf or drawn
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "Estimator", estimator)
        yield


@pytest.fixture(autouse=True, scope="module")
def _verified_in_a_fork(request: pytest.FixtureRequest) -> Iterator[None]:
    """An export compares its weights in a fork, which has imported all of it, but where that process is tested."""
    if not hasattr(os, "fork") or request.path.name in OF_THE_CHILD:
        yield
        return
    child, start = "qlora.export.verify.weights_child", subprocess.run

    def run(command: Any, *about: Any, **how: Any) -> Any:
        if child not in command:
            return start(command, *about, **how)
        from tests.faults.forks import run_module

        importlib.import_module(child)
        return run_module(command, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with tokenizer and chat template."""
    from tests.families import make_base

    return make_base("llama", tmp_path_factory.mktemp("base") / "llama")
