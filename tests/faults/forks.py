"""Runs in forked children of a warmed parent, so that a hundred of them fit into a minute.

The parent has imported everything and loaded rows and model; a child trains and may be killed by any signal, like any
process. What a child says through its pipe is known to have happened before it died.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora import child_process, disk, numerics, run_folder
from qlora.events import Event, Recorder, Sink, Sinks
from qlora.model import lora_functions
from qlora.model.base_watch import BaseWatch
from qlora.model.tokenizer_files import read_files
from qlora.numerics import Numerics
from qlora.recipe.reading import Recipe, load_recipe
from qlora.stop import StopRequest
from qlora.training import checkpoint, loop, setup
from qlora.training.memory_plan import MemorySettings
from qlora.training.phases import PhaseClock

INTERNAL = 70  # exit code of a child that met an error of ours


def settings_of(recipe: Recipe) -> MemorySettings:
    """The recipe's own settings, without a plan; "auto" recomputes nothing, as for any base that is so small."""
    micro, recompute = recipe.train.micro_batch_size, recipe.train.gradient_checkpointing
    assert micro != "auto"
    return MemorySettings(micro, recompute is True)


@dataclass
class Child:
    pid: int
    pipe: int
    code: int | None = None
    _rest: bytes = b""

    def lines(self, seconds: float) -> list[str]:
        """Whole lines that the child has said by now; waits for the first one, for `seconds` at most."""
        ready, _, _ = select.select([self.pipe], [], [], seconds)
        if ready:
            self._rest += os.read(self.pipe, 1 << 16)
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode() for line in lines]

    def wait_for(self, word: str, seconds: float = 60.0) -> str | None:
        """The first line with `word` in it, or None when the child ended or took too long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.lines(1.0):
                if word in line:
                    return line
            if self.poll() is not None:
                return next((line for line in self.lines(0.0) if word in line), None)
        return None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code, negative for a signal; and everything that was said is still in the pipe."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError("the child did not end")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def rest(self) -> list[str]:
        """Everything said and not read yet, after the child's end."""
        said = self._rest
        while piece := os.read(self.pipe, 1 << 16):
            said += piece
        os.close(self.pipe)
        return said.decode(errors="replace").splitlines()


def fork(work: Callable[[Callable[[str], None]], None], output: Path | None = None) -> Child:
    """Run `work(say)` in a child. It ends with 0, with SystemExit's code, or with INTERNAL and its traceback said."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, reading)
    code = 0
    try:
        os.close(reading)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        target = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for handle in (1, 2):
            os.dup2(target, handle)
        sys.stdout, sys.stderr = (os.fdopen(handle, "w", closefd=False) for handle in (1, 2))
        work(lambda line: os.write(writing, f"{line}\n".encode()) and None)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else INTERNAL
    except BaseException:
        os.write(writing, ("FAULT " + traceback.format_exc().replace("\n", " | ") + "\n").encode())
        code = INTERNAL
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            code = code or INTERNAL
        os._exit(code)


def run_module(
    command: Sequence[str], text: bool = False, stdout: Any = None, **_: Any
) -> subprocess.CompletedProcess[Any]:
    """In the place of `subprocess.run`: the module of such a command in a fork, which has imported all of it already.

    What an export verifies itself with would spend nine tenths of its time on imports. Both streams come back in one,
    and are written to `stdout` where that is a file.
    """
    beginning = child_process.command("module")[:-2]
    module, *arguments = command[len(beginning) + 1 :]
    assert list(command[: len(beginning)]) == beginning

    def work(_: Callable[[str], None]) -> None:
        warnings.resetwarnings()  # pytest makes errors of them
        sys.argv = [module, *arguments]
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__")

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        code = fork(work, log).wait()
        if hasattr(stdout, "write"):
            stdout.write(log.read_bytes())
        output = log.read_text(encoding="utf-8") if text else log.read_bytes()
    return subprocess.CompletedProcess(command, code, output, output)


class Telling:
    """A sink that says what happened through the pipe: `saved checkpoint 3`, `step 4`, `progress tokenize`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def emit(self, event: Event) -> None:
        values = event.as_dict()
        detail = {"saved": f"{values.get('what')} {values.get('step')}", "progress": values.get("task")}
        self.say(f"{event.kind} {detail.get(event.kind, values.get('step', values.get('message', '')))}")

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Warm:
    """A run made ready up to its first step; `train` in a child goes on from whatever the folder holds."""

    recipe: Recipe
    parts: dict[str, Any]

    def run_dir(self, folder: Path) -> Path:
        return folder / "tiny"

    def job(self, run_dir: Path, recipe: Recipe, sink: Sink, stop: StopRequest) -> setup.Job:
        memory, clock = settings_of(recipe), PhaseClock(sink)
        return setup.Job(recipe, run_dir, **self.parts, sink=sink, stop=stop, memory=memory, clock=clock)

    def train(self, folder: Path, say: Callable[[str], None], **checkpoint_keys: Any) -> None:
        """What `qlora-train --resume` does once model and rows are there (and `qlora-train` when nothing is)."""
        run_dir = self.run_dir(folder)
        recipe = self.recipe
        if checkpoint_keys:
            section = recipe.checkpoint.model_copy(update=checkpoint_keys)
            recipe = recipe.model_copy(update={"checkpoint": section})
        held = claimed(run_dir, recipe)
        sink = Sinks(Telling(say))
        disk.sweep_leftovers(run_dir)
        disk.sweep_leftovers(run_dir / "checkpoints")
        resume_from = checkpoint.newest(run_dir, sink)
        run_folder.write_recipe(run_dir, recipe, None)
        loop.run(self.job(run_dir, recipe, sink, StopRequest()), resume_from)
        held.release()


def claimed(run_dir: Path, recipe: Recipe) -> run_folder.Claim:
    """The folder taken to go on with what it holds; one in which a test has put checkpoints alone becomes a run's."""
    if not (run_dir / run_folder.RUN_FILE).exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        run_folder.write_recipe(run_dir, recipe, None)
    return run_folder.claim(run_dir, "resume")


def warm(recipe_file: Path, *overrides: str) -> Warm:
    """Everything loaded, in this process."""
    recipe = load_recipe(recipe_file, overrides)
    sink = Recorder()
    base, _ = setup.preflight(recipe, sink)
    tokenizer = read_files(base.path)
    chat, data = setup.prepare_rows(recipe, tokenizer, sink)
    with numerics.in_force(Numerics(functions=lora_functions.choose(recipe.lora))):
        prepared = setup.Prepared(chat, data, MemorySettings(1, True), None)
        model = setup.load_model(recipe, base, prepared, PhaseClock(sink))
    device = next(model.parameters()).device
    parts = {
        "model": model,
        "base": base,
        "tokenizer": tokenizer,
        "watch": BaseWatch.begin(base),
        "chat": chat,
        "data": data,
        "device": device,
    }
    return Warm(recipe, parts)


def in_child(warm_run: Warm, folder: Path, **checkpoint_keys: Any) -> Child:
    return fork(lambda say: warm_run.train(folder, say, **checkpoint_keys))


def finished(child: Child) -> None:
    """The child ended well; what it said of a fault is the test's message otherwise."""
    code = child.wait()
    faults = [line for line in child.rest() if line.startswith("FAULT")]
    assert code == 0 and not faults, (code, faults)


__all__ = ["INTERNAL", "Child", "Telling", "Warm", "finished", "fork", "in_child", "replace", "warm"]
