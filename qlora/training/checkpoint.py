"""What survives a crash: the run's state, saved as a folder published by one rename, and read back bit for bit.

A checkpoint holds `adapter.safetensors` (the bf16 adapters), `optimizer.safetensors` (fp32 masters and moments),
`state.json` (`RunState`, update counters, fingerprints of base and data) and `manifest.json` (sha256 and size of each,
versions, hash of the recipe). No
random state: random numbers are a function of the recipe and the step (`step.forward.seed_micro_batch`), and so is
the order of the rows. The final folder `adapter/` is another thing: the best adapter, in PEFT's layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qlora import disk
from qlora.errors import RunFolderError
from qlora.events import Notice, Saved, Sink
from qlora.step.optimizer import AdapterOptimizer

SPARE_BYTES = 1 << 20  # state.json, manifest.json and the file system's own blocks
# safetensors has an error of its own for a disk that is full, and it is no OSError.
WRITE_ERRORS = (OSError, SafetensorError)
FORMAT = 2  # of state.json; a change that old checkpoints cannot follow raises it


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
    evaluated_step: int = -1  # the last one that was evaluated: a stop may fall between a step and its evaluation
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_trend: float = 0.0  # of `health.Trend`
    loss_spread: float = 0.0
    losses_seen: int = 0
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


class SaveFailed(Exception):
    """Nothing was saved, and nothing of the attempt is left. The text says why."""


def save(
    run_dir: Path,
    state: RunState,
    optimizer: AdapterOptimizer,
    fingerprints: Fingerprints,
    keep: int,
    about: Mapping[str, Any],
) -> Saved:
    """Publish the state after `state.step` steps, then remove checkpoints beyond the newest `keep`.

    Raises SaveFailed when the disk is full or refuses; nothing is left of the new one then, and no old one is removed.
    """
    tensors, counters = optimizer.state()
    adapter = {key: parameter.detach().cpu().contiguous() for key, parameter in optimizer.parameters.items()}
    final = folder_of(run_dir, state.step)
    needed = sum(tensor.nbytes for tensor in (*tensors.values(), *adapter.values())) + SPARE_BYTES

    def write(folder: Path) -> None:
        save_file(adapter, folder / "adapter.safetensors")
        save_file(tensors, folder / "optimizer.safetensors")
        content = {
            "format": FORMAT,
            "state": asdict(state),
            "counters": counters,
            "fingerprints": asdict(fingerprints),
        }
        disk.write_atomic(folder / "state.json", json.dumps(content, indent=1) + "\n")

    try:
        if (free := disk.free_bytes(run_dir)) < needed:
            raise SaveFailed(f"it needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")
        size = disk.publish_folder(final, write, about)
    except WRITE_ERRORS as error:
        raise SaveFailed(reason(error)) from error
    for old in _folders(run_dir)[keep:]:
        with suppress(OSError):  # it stays for the next time; the new one stands
            disk.remove_folder(old)
    return Saved("checkpoint", state.step, str(final), size)


def reason(error: Exception) -> str:
    """Half a sentence on a failed write."""
    return str(getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__)


def largest_bytes(optimizer: AdapterOptimizer) -> int:
    """What a checkpoint takes at most: adapters, fp32 masters, and two fp32 moments before their first step."""
    adapter = sum(parameter.nbytes for parameter in optimizer.parameters.values())
    values = sum(parameter.numel() for parameter in optimizer.parameters.values())
    return adapter + 12 * values + SPARE_BYTES


def newest(run_dir: Path, sink: Sink) -> Checkpoint | None:
    """The newest checkpoint whose manifest verifies. A broken one is renamed to `<name>.brokenN` and said aloud."""
    for folder in _folders(run_dir):
        fault = disk.verify_folder(folder)
        if fault is None:
            try:
                return Checkpoint(folder, _read_state(folder))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                fault = f"state.json cannot be read ({error})"
        try:
            name = f"Set aside as {disk.set_aside(folder, '.broken').name}"
        except OSError as error:
            name = f"It stays where it is ({error.strerror or error})"
        sink.emit(Notice("checkpoint", f"{folder.name} is damaged: {fault}. {name}", 1))
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


def other_versions(checkpoint: Checkpoint, about: Mapping[str, Any]) -> str:
    """Packages that were of another version when the checkpoint was made: "torch 2.10 (now 2.11)"; "" for none."""
    made_with = disk.read_manifest(checkpoint.path).get("versions")
    if not isinstance(made_with, dict):
        return ""
    now: Mapping[str, str] = about["versions"]
    return ", ".join(
        f"{name} {made_with[name]} (now {version})"
        for name, version in sorted(now.items())
        if name in made_with and made_with[name] != version
    )


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
