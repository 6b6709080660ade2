"""What survives a crash: the run's state, saved as a folder published by one rename, and read back bit for bit.

A checkpoint holds `adapter.safetensors` (the bf16 adapters), `optimizer.safetensors` (fp32 masters and moments),
`state.json` (`RunState`, update counters, fingerprints of base and data) and `manifest.json` (sha256 of each). No
random state: random numbers are a function of the recipe and the step (`step.forward.seed_micro_batch`), and so is
the order of the rows. The final folder `adapter/` is another thing: the best adapter, in PEFT's layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora import disk
from qlora.errors import RunFolderError
from qlora.events import Notice, Saved, Sink
from qlora.step.optimizer import AdapterOptimizer

FORMAT = 1  # of state.json; a change that old checkpoints cannot follow raises it


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` optimizer steps. Whatever must survive a crash is a field of this."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    skipped_in_a_row: int = 0
    exact_match_before: float | None = None
    exact_match_after: float | None = None
    stopped_early: bool = False
    micro_batch_size: int | None = None  # what fitted: a resumed run goes on with it
    gradient_checkpointing: bool | None = None


@dataclass(frozen=True)
class Fingerprints:
    """What a checkpoint belongs to: resuming with another base or other rows is refused."""

    base: str
    data: str


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: RunState


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def save(
    run_dir: Path,
    state: RunState,
    optimizer: AdapterOptimizer,
    fingerprints: Fingerprints,
    keep: int,
) -> Saved:
    """Publish the state after `state.step` steps, then remove checkpoints beyond the newest `keep`.

    Raises OSError, SafetensorError or RuntimeError when the disk is full; nothing is left of the new one then.
    """
    tensors, counters = optimizer.state()

    def write(folder: Path) -> None:
        adapter = {key: parameter.detach().cpu().contiguous() for key, parameter in optimizer.parameters.items()}
        save_file(adapter, folder / "adapter.safetensors")
        save_file(tensors, folder / "optimizer.safetensors")
        content = {
            "format": FORMAT,
            "state": asdict(state),
            "counters": counters,
            "fingerprints": asdict(fingerprints),
        }
        disk.write_atomic(folder / "state.json", json.dumps(content, indent=1) + "\n")

    final = folder_of(run_dir, state.step)
    size = disk.publish_folder(final, write)
    for old in _folders(run_dir)[keep:]:
        disk.remove_folder(old)
    return Saved("checkpoint", state.step, str(final), size)


def newest(run_dir: Path, sink: Sink) -> Checkpoint | None:
    """The newest checkpoint whose manifest verifies. A broken one is renamed to `<name>.brokenN` and said aloud."""
    for folder in _folders(run_dir):
        fault = disk.verify_folder(folder)
        if fault is None:
            try:
                return Checkpoint(folder, _read_state(folder))
            except (ValueError, KeyError, TypeError) as error:
                fault = f"state.json cannot be read ({error})"
        moved = disk.set_aside(folder, ".broken")
        sink.emit(Notice("checkpoint", f"{folder.name} is damaged: {fault}. Set aside as {moved.name}", 1))
    return None


def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    optimizer: AdapterOptimizer,
    fingerprints: Fingerprints,
) -> None:
    """Put a checkpoint's tensors into the model and its optimizer. Raises RunFolderError when they do not belong."""
    content = json.loads((checkpoint.path / "state.json").read_text())
    saved = Fingerprints(**content["fingerprints"])
    for what, ours, theirs in (("base", fingerprints.base, saved.base), ("data", fingerprints.data, saved.data)):
        if ours != theirs:
            raise RunFolderError(
                f"{checkpoint.path}: was made with another {what} (its files have changed since)",
                f"put the {what} back as it was, or start anew with --fresh",
            )
    adapter = load_file(checkpoint.path / "adapter.safetensors")
    tensors = load_file(checkpoint.path / "optimizer.safetensors")
    try:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(adapter[key])
        optimizer.load_state(tensors, content["counters"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise RunFolderError(
            f"{checkpoint.path}: does not fit this model ({error})", "start anew with --fresh"
        ) from error


def _read_state(folder: Path) -> RunState:
    content = json.loads((folder / "state.json").read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
    known = {field.name for field in fields(RunState)}
    return RunState(**{key: value for key, value in content["state"].items() if key in known})


def _folders(run_dir: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)
