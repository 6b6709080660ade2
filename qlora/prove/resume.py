"""A run that was killed and goes on in a new process ends with the bits of one that was never stopped."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from qlora import api, child_process, disk
from qlora.events import EVENTS_FILE, Recorder
from qlora.prove import trained
from qlora.prove.proof import Figure, Outcome, Place, Proof
from qlora.training.checkpoint import folder_of

KILL_AFTER = 1  # checkpoint
SECONDS = 240  # a run of a few small steps that has not saved by then hangs
FILES = ("adapter.safetensors", "optimizer.safetensors")
MEMORY = 1.01  # of the uninterrupted run's peak: bitsandbytes' own loading would move paged state to the GPU for good


def run(place: Place) -> Outcome:
    straight = trained.straight(place)
    file = trained.recipe_file(place, "killed")
    folder = trained.run_dir(place, "killed")
    killed = _killed(file, folder)
    recorder = Recorder()
    api.train(trained.recipe_of(file), name="killed", mode="resume", sink=recorder)
    began = recorder.of("start")[0].as_dict()["resumed_from_step"]
    ends = [folder_of(one, trained.STEPS) for one in (straight, folder)]
    different = [name for name in FILES if len({disk.sha256_file(end / name) for end in ends}) != 1]
    notices = [str(event.as_dict()["message"]) for event in recorder.of("notice")]
    inexact = [said for said in notices if "bit for bit" in said]
    peak, straight_peak = _peak(folder), _peak(straight)
    measured: dict[str, Figure] = {"killed": killed, "resumed_from_step": began, "steps": trained.STEPS}
    measured |= {"different": ", ".join(different), "peak_bytes": peak, "uninterrupted_peak_bytes": straight_peak}
    said = (
        f"killed by the system, resumed from step {began} of {trained.STEPS}, " if killed else "ended before the kill; "
    )
    said += f"other bits in {', '.join(different)}" if different else "the same bits"
    grew = place.on_card and peak > MEMORY * straight_peak
    return Outcome(not (different or inexact or grew), "; ".join([said, *inexact]), measured)


def _killed(file: Path, folder: Path) -> bool:
    """Train in another process and kill it after a few checkpoints; whether it was killed, and had not ended before."""
    events = folder / EVENTS_FILE
    command = child_process.command("qlora.cli.train", str(file), "--set", f"output.dir={folder.parent}")
    with child_process.life_line() as line:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, stdin=line, **quiet) as child:  # type: ignore[call-overload]
            deadline = time.monotonic() + SECONDS
            while child.poll() is None and time.monotonic() < deadline:
                if events.is_file() and events.read_bytes().count(b'"event": "saved"') >= KILL_AFTER:
                    break
                time.sleep(0.01)
            child.kill()
            return bool(child.wait() < 0)


def _peak(folder: Path) -> int:
    """The highest peak of the run's steps, of its last process."""
    from qlora.report.files import read_events

    return max(
        (event["peak_bytes"] for event in read_events(folder / EVENTS_FILE) if event["event"] == "step"), default=0
    )


PROOF = Proof(
    name="resume",
    promise="a run that was killed goes on bit for bit, in no more memory",
    tolerance=f"0: bit for bit; on a GPU {MEMORY} of the uninterrupted run's peak",
    source="training/checkpoint.py; bitsandbytes issues #782 and #1381 (paged state)",
    run=run,
)
