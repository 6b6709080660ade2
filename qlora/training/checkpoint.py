"""What survives a crash: the run's state, saved as a folder published by one rename, and read back bit for bit.

A checkpoint holds `adapter.safetensors` (the bf16 adapters), `optimizer.safetensors` (fp32 masters and moments),
`state.json` (`RunState`, update counters, fingerprints of base and data) and `manifest.json` (sha256 and size of each,
versions, hash of the recipe). No random state: random numbers are a function of the recipe and the step
(`step.forward.seed_micro_batch`), and so is the order of the rows. The final folder `adapter/` is another thing: the
best adapter, in PEFT's layout.

A save is a copy of the state in host memory, which a thread writes while the steps go on (`qlora/saving.py`). It is
waited for before the next one, before an adapter is delivered, when memory runs out, and however the run ends.
"""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file

from qlora import disk, foreign_json, run_folder
from qlora.dealing import Shares
from qlora.device import to_host
from qlora.errors import ModelError, RunFolderError
from qlora.events import Notice, Saved, Sink
from qlora.foreign_json import ForeignFileError, ForeignModel
from qlora.loss_scale import LossScale
from qlora.model import identity
from qlora.model.base_folder import BaseFolder
from qlora.model.delivered_loss import DeliveredLoss
from qlora.model.identity import Fingerprints
from qlora.model.meta_model import build, taken_tensors
from qlora.model.tensors import read_file
from qlora.numerics import Numerics
from qlora.recipe.reading import Recipe
from qlora.saving import Saving
from qlora.step.optimizer import AdapterOptimizer
from qlora.stop import StopRequest
from qlora.training import schedule
from qlora.training.phases import PhaseClock

SPARE_BYTES = 1 << 20  # state.json, manifest.json and the file system's own blocks
FORMAT: Literal[2] = 2  # of state.json; a change that old checkpoints cannot follow raises it
MOST = 2**53  # of anything that is counted
CHECKPOINTS_AT_ONCE = 2  # the old one stays until the new one stands

Count = Annotated[int, Field(ge=0, le=MOST)]
Loss = Annotated[float, Field(allow_inf_nan=True)]


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` optimizer steps. Whatever must survive a crash is a field of this."""

    step: Count = 0
    tokens: Count = 0
    trained_tokens: Count = 0
    seconds: float = 0.0
    train_loss: Loss | None = None
    eval_loss: Loss | None = None
    best_loss: Loss | None = None
    best_step: Count | None = None
    evaluations_without_improvement: Count = 0
    # The last one that was evaluated: a stop may fall between a step and its evaluation.
    evaluated_step: Count | Literal[-1] = -1
    skipped: Count = 0
    skipped_in_a_row: Count = 0
    loss_trend: float = 0.0  # of `health.Trend`
    loss_spread: float = 0.0
    losses_seen: Count = 0
    exact_match_before: float | None = None
    exact_match_after: float | None = None
    stopped_early: bool = False
    micro_batch_size: Annotated[int, Field(ge=1, le=MOST)] | None = None  # what fitted: a resumed run goes on with it
    gradient_checkpointing: bool | Annotated[int, Field(ge=1, le=MOST)] | None = None  # the first so many layers
    answers_at_once: Annotated[int, Field(ge=1, le=MOST)] | None = None
    answers: str | None = None  # sha256 of the drawing that the last step learned from
    delivered: DeliveredLoss | None = None  # of the best step
    loss_scale: LossScale | None = None  # of fp16
    numerics: Numerics | None = None  # what its numbers depend on; None where an older version saved it
    shares: Shares | None = None  # of several processes


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: RunState


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def snapshot(
    run_dir: Path,
    state: RunState,
    optimizer: AdapterOptimizer,
    fingerprints: Fingerprints,
    keep: int,
    about: Mapping[str, Any],
) -> Callable[[], Saved]:
    """Copy the state after `state.step` steps. What is returned publishes the copy, in whatever thread, whatever steps
    are done meanwhile, then removes checkpoints beyond the newest `keep`.

    That raises one of `saving.WRITE_ERRORS` when the disk is full or refuses; nothing is left of the new one then, and
    no old one is removed.
    """
    tensors, counters = optimizer.state()
    adapter = {key: to_host(parameter).contiguous() for key, parameter in optimizer.parameters.items()}
    final = folder_of(run_dir, state.step)
    needed = sum(tensor.nbytes for tensor in (*tensors.values(), *adapter.values())) + SPARE_BYTES

    def write(folder: Path) -> None:
        save_file(adapter, folder / "adapter.safetensors")
        save_file(tensors, folder / "optimizer.safetensors")
        belongs = {"counters": counters, "fingerprints": fingerprints.as_dict()}
        models = {name: getattr(state, name) for name in ("delivered", "numerics", "loss_scale", "shares")}
        as_values = {name: None if model is None else model.model_dump() for name, model in models.items()}
        content = {"format": FORMAT, "state": {**asdict(state), **as_values}, **belongs}
        disk.write_atomic(folder / "state.json", json.dumps(content, indent=1) + "\n")

    def publish() -> Saved:
        run_folder.check_there(run_dir, about)
        if (free := disk.free_bytes(run_dir)) < needed:
            raise OSError(errno.ENOSPC, f"it needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")
        size = disk.publish_folder(final, write, about).bytes
        for old in _folders(run_dir)[keep:]:
            with suppress(OSError):  # it stays for the next time; the new one stands
                disk.remove_folder(old)
        return Saved("checkpoint", state.step, str(final), size)

    return publish


def newest(run_dir: Path, sink: Sink) -> Checkpoint | None:
    """The newest checkpoint whose manifest verifies. A damaged one is renamed to `<name>.brokenN`, with a notice."""
    for folder in _folders(run_dir):
        found = _open(folder)
        if isinstance(found, Checkpoint):
            return found
        try:
            name = f"Set aside as {disk.set_aside(folder, '.broken').name}"
        except OSError as error:
            name = f"It stays where it is ({error.strerror or error})"
        sink.emit(Notice("checkpoint", f"{folder.name} is damaged: {found}. {name}", 1))
    return None


def at_step(run_dir: Path, step: int) -> Checkpoint | None:
    """The checkpoint of a step, whose manifest verifies; None where it is not kept, or damaged."""
    found = _open(folder_of(run_dir, step))
    return found if isinstance(found, Checkpoint) else None


def _open(folder: Path) -> Checkpoint | str:
    """A checkpoint, or what is wrong with it."""
    if fault := disk.verify_folder(folder):
        return fault
    try:
        run_folder.made_with(folder)
        return Checkpoint(folder, _read(folder)[0])
    except ForeignFileError as error:
        return str(error)


def check_base(checkpoint: Checkpoint, base: BaseFolder) -> None:
    """Refuse another base as far as that shows before it is loaded. Raises RunFolderError."""
    saved = _read(checkpoint.path)[1]
    at_the_door = identity.at_the_door(base.config, taken_tensors(base, build(base)))
    _refuse(checkpoint, "base", saved.other_base(replace(saved, base=base.fingerprint, base_identity=at_the_door)))


def restore(checkpoint: Checkpoint, optimizer: AdapterOptimizer, now: Fingerprints) -> None:
    """Put a checkpoint's tensors into the optimizer and its parameters. Raises RunFolderError when they do not fit."""
    _, saved, counters = _read(checkpoint.path)
    _refuse(checkpoint, "base", saved.other_base(now))
    _refuse(checkpoint, "data", saved.other_data(now))
    ours = {key: (parameter.shape, parameter.dtype) for key, parameter in optimizer.parameters.items()}
    try:
        adapter, tensors = (read_file(checkpoint.path / f"{name}.safetensors") for name in ("adapter", "optimizer"))
        if {key: (tensor.shape, tensor.dtype) for key, tensor in adapter.items()} != ours:
            raise ValueError("names, shapes or types of its adapter are others")
        if strange := sorted({key.partition("/")[2] for key in tensors} - {*ours, ""}):
            raise ValueError(f"its optimizer knows {strange[0]!r}, which is not trained")
        with torch.no_grad():
            for key, parameter in optimizer.parameters.items():
                parameter.copy_(adapter[key])
        optimizer.load_state(tensors, counters)
    except (ModelError, KeyError, ValueError, RuntimeError) as error:
        raise RunFolderError(
            f"{checkpoint.path}: does not fit this model ({error})", "start anew with mode='fresh'"
        ) from error


def _refuse(checkpoint: Checkpoint, what: str, difference: str | None) -> None:
    if difference is not None:
        raise RunFolderError(
            f"{checkpoint.path}: was made with another {what}: {difference}",
            f"put the {what} back as it was, or start anew with mode='fresh', which keeps this run and its adapter",
        )


@dataclass
class Checkpointer:
    """Saves one run's states into its folder, at the recipe's intervals and when asked to."""

    run_dir: Path
    recipe: Recipe
    optimizer: AdapterOptimizer
    fingerprints: Fingerprints
    stop: StopRequest
    clock: PhaseClock

    def __post_init__(self) -> None:
        self.about = run_folder.provenance(self.recipe, self.run_dir)
        self.saving = Saving(self.run_dir, self.clock.sink)
        self._tried_at = time.monotonic()

    def check_room(self) -> None:
        """Whether two checkpoints and the delivered adapter fit on the disk. Raises RunFolderError."""
        if self.saving.saved_step >= 0:
            return  # what is resumed has its place already
        adapter_bytes = sum(parameter.nbytes for parameter in self.optimizer.parameters.values())
        values = sum(parameter.numel() for parameter in self.optimizer.parameters.values())
        # Adapters, fp32 masters, and two fp32 moments, which exist from the first step on.
        checkpoint_bytes = adapter_bytes + 12 * values + SPARE_BYTES
        needed = CHECKPOINTS_AT_ONCE * checkpoint_bytes + 2 * adapter_bytes
        free = disk.free_bytes(self.run_dir)
        if free < needed:
            raise RunFolderError(
                f"{self.run_dir}: checkpoints and adapter need {needed / 2**20:.0f} MiB there, "
                f"{free / 2**20:.0f} MiB are free",
                "free some space, or name another disk in output.dir",
            )

    def is_due(self, step: int) -> bool:
        self.saving.look()
        elapsed_minutes = (time.monotonic() - self._tried_at) / 60
        asked = self.stop.take_save_request()
        return asked or schedule.checkpoint_is_due(step, elapsed_minutes, self.recipe.checkpoint)

    def resume(self, checkpoint: Checkpoint) -> RunState:
        """Put a checkpoint back; its state. Raises RunFolderError when it belongs to another base or other rows."""
        restore(checkpoint, self.optimizer, self.fingerprints)
        if _read(checkpoint.path)[1].base_identity is None:
            self.clock.sink.emit(Notice("base", f"{checkpoint.path.name} {identity.NOT_COMPARED}"))
        self.saving.saved_step = max(self.saving.saved_step, checkpoint.state.step)  # a newer one is not written over
        return checkpoint.state

    def save(self, state: RunState, last_chance: bool = False) -> None:
        """Begin to save, unless this step is saved already; of a last chance, also wait for it.

        Raises TrainingStopped when it has failed too often.
        """
        with self.clock.phase("saving"):
            self.saving.settle()
            if state.step in (self.saving.saved_step, 0):
                return
            self._tried_at = time.monotonic()
            facts = (self.fingerprints, self.recipe.checkpoint.keep, self.about)
            self.saving.begin(state.step, snapshot(self.run_dir, state, self.optimizer, *facts))
            if last_chance:
                self.saving.settle(last_chance)

    def deliver(self, publish: Callable[[], None], step: int, last_chance: bool = False) -> bool:
        """Write the adapter's folder; whether it was written. Counts with the states: it is the same disk."""

        def work() -> None:
            run_folder.check_there(self.run_dir, self.about)
            publish()

        with self.clock.phase("saving", "save adapter"):
            self.saving.settle()
            return self.saving.attempt(f"the adapter of step {step}", work, step, last_chance)


class _StateFile(ForeignModel):
    format: Literal[2]
    state: dict[str, Any]
    counters: dict[str, Count]
    fingerprints: dict[str, Any]


def _read(folder: Path) -> tuple[RunState, Fingerprints, dict[str, int]]:
    """What `state.json` holds: state, fingerprints, update counters. Raises ForeignFileError with file and key."""
    file = folder / "state.json"
    found = foreign_json.checked(_StateFile, foreign_json.load(file), str(file))
    state = foreign_json.checked_dataclass(RunState, found.state, f"{file}: state")
    fingerprints = foreign_json.checked_dataclass(Fingerprints, found.fingerprints, f"{file}: fingerprints")
    return state, fingerprints, found.counters


def _folders(run_dir: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"[0-9]{6,16}", path.name[5:])]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)
