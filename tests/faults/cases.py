"""What tests of kills, signals and full disks share: settings whose runs are short, and what such a run ends with."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.disk import sha256_file

# Of all points at which something can be made to fail, each fourth is tried; QLORA_TEST_EVERY=1 tries each.
EVERY = int(os.environ.get("QLORA_TEST_EVERY", "4"))
FILES = ("adapter.safetensors", "optimizer.safetensors")
# Noise on the embeddings, which is drawn, two micro-batches a step and an evaluation that delivers an adapter: all that
# a step depends on; and layers computed by our own functions, which dropout would leave to peft. In bf16 and on few
# layers, since a hundred processes are to pass quickly (tests/training/test_resume.py has 4 bit).
SETTINGS = (
    *(
        "train.neftune_alpha=5.0",
        "lora.r=4",
        "train.batch_size=2",
        "train.micro_batch_size=1",
        "train.learning_rate=1e-3",
    ),
    *("data.max_length=48", "data.eval_fraction=0.1", "eval.every_steps=5", "eval.samples=0", "report.sinks=[]"),
    *('quantization.type="none"', "train.gradient_checkpointing=false", 'lora.target_modules=["q_proj", "v_proj"]'),
)


def last_hashes(folder: Path, step: int) -> dict[str, str]:
    """sha256 of adapter and optimizer of the checkpoint after `step`, in the folder of a `Warm` run."""
    return {name: sha256_file(folder / "tiny" / "checkpoints" / f"step-{step:06d}" / name) for name in FILES}


# --- a kill at each call that touches the disk -----------------------------------------------------------------------

CALLS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod", "scandir")


@contextmanager
def tripwire(at: int) -> Iterator[list[str]]:
    """Count the calls that touch the disk, of all threads; SIGKILL before the one numbered `at` (0: never)."""
    seen: list[str] = []
    turn = threading.Lock()
    before = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            with turn:
                seen.append(name)
                if len(seen) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return before[name](*values, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        yield seen
    finally:
        for name in CALLS:
            setattr(os, name, before[name])
