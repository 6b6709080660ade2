"""Signals in every phase: the exit code is right, the state is saved if there is one, and nothing is lost."""

from __future__ import annotations

import os
import pty
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora import disk
from qlora.disk import sha256_file
from qlora.events import Event
from qlora.report import console
from qlora.report.files import read_events
from qlora.training import checkpoint
from tests.faults.cases import EVERY, SETTINGS
from tests.faults.forks import Child, fork, run_module
from tests.runs import write_recipe
from tests.sampling import sampled

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs fork")]

MOMENTS = 16 // EVERY
STEPS = 8
RUN = (
    *(setting for setting in SETTINGS if not setting.startswith(("report", "eval.samples", "eval.every"))),
    *("eval.every_steps=2", "eval.samples=1", "eval.exact_match_rows=1", f"train.max_steps={STEPS}"),
    *("checkpoint.every_steps=3", "export.formats=['hf']", "train.optimizer=adamw"),
)


@pytest.fixture(scope="module", autouse=True)
def warmed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Everything that a run imports is imported before the first fork, what its export verifies itself with too."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import qlora.cli.train
    import qlora.export.hf
    import qlora.export.verify.weights_child  # noqa: F401
    from qlora.model import adapters, load  # noqa: F401
    from qlora.model.resolve import resolve
    from tests.runs import train as run

    recipe = write_recipe(tmp_path_factory.mktemp("warm"), llama)
    run(recipe, *RUN, "train.max_steps=1")
    resolve(str(llama), "main", _Silent())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run_module)
        yield


class _Silent:
    def emit(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


class _Told(console.ConsoleSink):
    """The screen, telling the test what it is shown."""

    say: Callable[[str], None]

    def emit(self, event: Event) -> None:
        values = event.as_dict()
        detail = values.get("task") or values.get("what") or values.get("topic") or ""
        self.say(f"{event.kind} {detail} {values.get('step', '')}")
        super().emit(event)


def command(recipe: Path, cache: Path, *flags: str, output: Path | None = None) -> Child:
    """`qlora-train` in a child, as the command line runs it."""

    def work(say: Callable[[str], None]) -> None:
        import sys

        from qlora.cli.train import app

        os.environ["QLORA_CACHE"] = str(cache)
        _Told.say = staticmethod(say)  # type: ignore[assignment]
        console.ConsoleSink = _Told  # type: ignore[misc]
        sys.argv = ["qlora-train", str(recipe), *flags, *(word for item in RUN for word in ("--set", item))]
        app()

    return fork(work, output)


def final(recipe: Path) -> dict[str, str]:
    folder = recipe.parent / "runs" / "tiny"
    last = checkpoint.folder_of(folder, STEPS)
    found = {name: sha256_file(last / name) for name in ("adapter.safetensors", "optimizer.safetensors")}
    found["adapter"] = sha256_file(folder / "adapter" / "adapter_model.safetensors")
    return found | {"export": sha256_file(folder / "export" / "hf" / "model.safetensors")}


def finish(recipe: Path, cache: Path) -> int:
    """Go on with whatever there is, to the end. Returns how many events there were."""
    trained = (recipe.parent / "runs" / "tiny" / "checkpoints").exists()
    log = recipe.parent / "finish.txt"
    child = command(recipe, cache, *(["--resume"] if trained else []), output=log)
    assert child.wait() == 0, log.read_text()
    return len(child.rest())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama: Path, warmed: None) -> tuple[dict[str, str], int]:
    """What an uninterrupted run ends with, and how many events it has."""
    recipe = write_recipe(tmp_path_factory.mktemp("straight"), llama)
    events = finish(recipe, recipe.parent / "cache")
    return final(recipe), events


def test_sigterm_at_random_moments(tmp_path: Path, llama: Path, straight: tuple[dict[str, str], int]) -> None:
    wanted, events = straight
    chance = random.Random(7)
    codes: list[int] = []
    phases: list[str] = []
    for number in range(MOMENTS):
        recipe = write_recipe(tmp_path / str(number), llama)
        log = tmp_path / f"{number}.txt"
        child = command(recipe, tmp_path / str(number) / "cache", output=log)
        # Counted in events, not in seconds: how long a run takes depends on what else the machine does.
        moment = events * 0.97 * (number + chance.random()) / MOMENTS
        said: list[str] = []
        while len(said) < moment and child.poll() is None:
            said += child.lines(1.0)
        time.sleep(chance.random() * 0.02)
        child.kill(signal.SIGTERM)
        codes.append(child.wait())
        said += child.rest()
        phases.append(next((line for line in reversed(said) if not line.startswith("end")), "start").strip())
        # -15: before the command has its handlers, the system ends it; a shell shows 143 for that too. 0: it was done.
        assert codes[-1] in (143, -signal.SIGTERM, 0), (codes[-1], said, log.read_text())
        if codes[-1] == 143:
            assert "error: stopped by SIGTERM" in log.read_text()
        finish(recipe, tmp_path / str(number) / "cache")
        assert final(recipe) == wanted, (number, phases)
        steps = [
            event["step"] for event in read_events(recipe.parent / "runs/tiny/events.jsonl") if event["event"] == "step"
        ]
        assert steps == list(range(1, STEPS + 1))
    print(f"{codes.count(143)} of {MOMENTS} left with 143; last words before the signal: {phases}")
    assert codes.count(143) >= MOMENTS - 2


PHASES = ("progress tokenize", "progress load", "progress evaluate", "step  2", "saved checkpoint", "progress merge")


@pytest.mark.parametrize("phase", sampled(PHASES, "progress load", "step  2", "progress merge"))
def test_sigterm_in_each_phase(tmp_path: Path, llama: Path, straight: tuple[dict[str, str], int], phase: str) -> None:
    """Sent by the run to itself the moment it says that it is there."""
    recipe = write_recipe(tmp_path, llama)
    log = tmp_path / "log.txt"
    child = stopped_at(recipe, tmp_path / "cache", phase, log, (signal.SIGTERM,))
    assert child.wait() == 143, log.read_text()
    error = log.read_text()[log.read_text().index("error: ") :]
    assert error.startswith("error: stopped by SIGTERM") and "resume" in error
    saved = list((tmp_path / "runs" / "tiny").glob("checkpoints/step-*"))
    assert bool(saved) == (phase not in PHASES[:3]), saved
    assert all(disk.verify_folder(folder) is None for folder in saved)
    finish(recipe, tmp_path / "cache")
    assert final(recipe) == straight[0]


def stopped_at(recipe: Path, cache: Path, phase: str, log: Path, numbers: tuple[int, ...]) -> Child:
    """A run that gets signals when it first says `phase`."""

    def work(say: Callable[[str], None]) -> None:
        import sys

        from qlora.cli.train import app

        waiting = list(numbers)

        class Hit(_Told):
            def emit(self, event: Event) -> None:
                hits: list[str] = []
                self.say = hits.append  # type: ignore[method-assign]
                super().emit(event)
                say(hits[0])
                if hits[0].startswith(phase):
                    while waiting:
                        os.kill(os.getpid(), waiting.pop(0))

        os.environ["QLORA_CACHE"] = str(cache)
        console.ConsoleSink = Hit  # type: ignore[misc]
        sys.argv = ["qlora-train", str(recipe), *(word for item in RUN for word in ("--set", item))]
        app()

    return fork(work, log)


def test_the_second_signal_ends_it_at_once(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    phase = "saved checkpoint"  # of step 3, by a thread, so that steps 4 and 5 may have been computed
    child = stopped_at(recipe, tmp_path / "cache", phase, tmp_path / "log.txt", (signal.SIGINT, signal.SIGINT))
    assert child.wait() == 130
    assert "saved after" not in (tmp_path / "log.txt").read_text()  # it did not wait for that
    assert [p.name for p in (tmp_path / "runs/tiny/checkpoints").iterdir()] == ["step-000003"]
    assert disk.verify_folder(tmp_path / "runs/tiny/checkpoints/step-000003") is None


def test_sigint_leaves_with_130(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    child = stopped_at(recipe, tmp_path / "cache", "step  5", tmp_path / "log.txt", (signal.SIGINT,))
    assert child.wait() == 130
    assert f"saved after step 5 of {STEPS}" in (tmp_path / "log.txt").read_text()


def test_a_signal_while_saving_is_answered_after_it(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)

    def work(say: Callable[[str], None]) -> None:
        import sys

        from qlora.cli.train import app

        real = disk.sha256_file

        def hash_and_hit(path: Path) -> str:
            if "step-000003" in str(path) and not say_once:
                say_once.append(1)
                os.kill(os.getpid(), signal.SIGTERM)
            return real(path)

        say_once: list[int] = []
        disk.sha256_file = hash_and_hit
        sys.argv = ["qlora-train", str(recipe), *(word for item in RUN for word in ("--set", item))]
        app()

    assert fork(work, tmp_path / "log.txt").wait() == 143
    # A thread writes while steps go on: which one it stopped after is a matter of time, that it is whole there is not.
    (step,) = re.findall(rf"saved after step (\d) of {STEPS}", (tmp_path / "log.txt").read_text())
    checkpoints = {folder.name: disk.verify_folder(folder) for folder in (tmp_path / "runs/tiny/checkpoints").iterdir()}
    assert {"step-000003", f"step-{step:>06}"} <= set(checkpoints) and not any(checkpoints.values())
    steps = [e["step"] for e in read_events(tmp_path / "runs/tiny/events.jsonl") if e["event"] == "step"]
    assert steps[-1] == int(step)


# --- nobody looks any more -------------------------------------------------------------------------------------------


def test_a_closed_terminal_saves_and_goes_on(tmp_path: Path, llama: Path, straight: tuple[dict[str, str], int]) -> None:
    """SIGHUP after step 4, which is no step to save at: the run saves there, and ends as any other."""
    recipe = write_recipe(tmp_path, llama)
    child = stopped_at(recipe, tmp_path / "cache", "step  4", tmp_path / "log.txt", (signal.SIGHUP,))
    assert child.wait() == 0
    saved = [
        e["step"]
        for e in read_events(tmp_path / "runs/tiny/events.jsonl")
        if e["event"] == "saved" and e["what"] == "checkpoint"
    ]
    assert saved[:3] == [3, 4, 6]
    assert final(recipe) == straight[0]
    assert "step 5" not in (tmp_path / "log.txt").read_text()  # nothing was drawn after it


def test_a_terminal_that_is_gone_ends_nothing(
    tmp_path: Path, llama: Path, straight: tuple[dict[str, str], int]
) -> None:
    """A real terminal, closed under the run: SIGHUP, then EIO on every write."""
    recipe = write_recipe(tmp_path, llama)
    pid, terminal = pty.fork()
    if pid == 0:
        _be_the_command(recipe, tmp_path / "cache")
    _read_until(terminal, b"step 2")
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert final(recipe) == straight[0]


def test_a_reader_that_leaves_ends_nothing(tmp_path: Path, llama: Path, straight: tuple[dict[str, str], int]) -> None:
    """`qlora-train … | head -1`."""
    recipe = write_recipe(tmp_path, llama)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(writing, 1)
        _be_the_command(recipe, tmp_path / "cache")
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert final(recipe) == straight[0]


def _be_the_command(recipe: Path, cache: Path) -> Any:
    import sys

    from qlora.cli.train import app

    code = 70
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ["QLORA_CACHE"] = str(cache)
        sys.argv = ["qlora-train", str(recipe), *(word for item in RUN for word in ("--set", item))]
        app()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def _read_until(terminal: int, word: bytes) -> None:
    seen = b""
    end = time.monotonic() + 60
    while word not in seen and time.monotonic() < end:
        seen += os.read(terminal, 4096)
    assert word in seen, seen


def test_handlers_are_given_back() -> None:
    from qlora.cli import common
    from qlora.stop import StopRequest

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    stop = StopRequest()
    with common.Signals(stop, common.Screen(None, stop)):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
