"""Several processes of one run for tests: forks of this one, as a launcher would start them, each with its words."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora.report.files import read_events
from qlora.training.loop import Training
from tests.attacks.terminals import begun, command
from tests.runs import run_dir

SECONDS = 240.0
# What a run imports on its way: else each process does so anew, which took 30 of 100 processor seconds of a file.
IMPORTED = (
    *("bitsandbytes", "datasets", "pandas", "peft", "transformers.models.llama.modeling_llama"),
    *("qlora.cli.train", "qlora.cli.together", "qlora.report.console", "qlora.data.hub_rows", "qlora.export.gguf.plan"),
    *("qlora.training.follower", "qlora.training.memory_plan"),
)
Hook = Callable[[], None]  # what a process does to itself before it begins


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Ended:
    """Exit codes and words of the processes, by their numbers."""

    codes: list[int]
    said: list[str]


@functools.cache
def _warm() -> None:
    for name in IMPORTED:
        importlib.import_module(name)


def train(recipe: Path, count: int, *overrides: str, hooks: Mapping[int, Hook] | None = None, flag: str = "") -> Ended:
    """`qlora-train` by `count` processes, to their end; those that take over SECONDS are killed."""
    _warm()
    port, folder, pids = free_port(), recipe.parent / f"said-{time.monotonic_ns()}", []
    folder.mkdir()
    words = [word for item in overrides for word in ("--set", item)]
    work = command("train", str(recipe), *words, *([flag] if flag else []))
    for rank in range(count):
        settings = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        settings |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        said = str(folder / str(rank))
        settings = settings if count > 1 else {}
        pids.append(begun(work, {0: os.devnull, 1: said, 2: said}, settings, (hooks or {}).get(rank)))
    codes = [_wait(pid, time.monotonic() + SECONDS) for pid in pids]
    return Ended(codes, [(folder / str(rank)).read_text() for rank in range(count)])


def _wait(pid: int, until: float) -> int:
    while time.monotonic() < until:
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def masters(recipe: Path, step: int) -> Path:
    return run_dir(recipe) / "checkpoints" / f"step-{step:06d}" / "optimizer.safetensors"


def apart(one: Path, other: Path, step: int) -> float:
    """The largest difference of two runs' fp32 weights."""
    left, right = (load_file(masters(recipe, step)) for recipe in (one, other))
    names = [name for name in left if name.startswith("master/")]
    assert names and left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in names)


def events(recipe: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir(recipe) / "events.jsonl") if event["event"] == kind]


def stops_after(step: int) -> Hook:
    """The process gets a SIGTERM of its own as it comes to the step after that one."""

    def hook() -> None:
        gather = Training._micro_steps

        def stopping(training: Training, state: Any, *rest: Any) -> Any:
            if state.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return gather(training, state, *rest)

        Training._micro_steps = stopping  # type: ignore[method-assign]

    return hook


def runs_out_at(step: int) -> None:
    """In this process memory runs out in the step after that one, the first time that it is tried."""
    gather, tried = Training._micro_steps, []

    def failing(training: Training, state: Any, *rest: Any) -> Any:
        if state.step == step and not tried:
            tried.append(state.step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
        return gather(training, state, *rest)

    Training._micro_steps = failing  # type: ignore[method-assign]
