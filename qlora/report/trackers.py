"""Trackers that a recipe names (tensorboard, wandb, mlflow, trackio), through accelerate's own classes for them.

They get the recipe and, by step, the numbers of steps and evaluations. None of them ends a run: one that fails is let
go of, which is said once. A run that goes on goes on in the same run of the tracker: what was sent is written down
beside it (`trackers/NAME.steps`), and a step that is done again after a crash is not sent again. Nothing leaves the
machine: wandb keeps its run on the disk, and so does mlflow where no MLFLOW_TRACKING_URI says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from io import FileIO, StringIO
from pathlib import Path
from typing import Any

from qlora import disk, files
from qlora.errors import UserError, foreign_failures
from qlora.events import Evaluated, Event, Notice, Preferred, Sink, Start, StepDone
from qlora.recipe.reading import FREE_SECTIONS, Recipe
from qlora.redaction import redact_all
from qlora.report.run_files import flattened
from qlora.reward_events import Rewarded
from qlora.shown import plain_values

FOLDER = "trackers"  # in the run's folder
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),  # mlflow-skinny comes without what a database on the disk needs
    "trackio": ("trackio",),
}
PROJECT = "qlora"  # under which a tracker that has projects keeps the runs
_MAX_RECORD_BYTES = 1 << 28
_STEP = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes")
_SIDES = ("train", "eval", "preference", "preference_eval", "rewards", "rewards_eval")
_PREFERENCE = ("accuracy", "margin", "better_reward", "worse_reward", "divergence", "kl")
_REWARDS = ("reward", "tokens", "cut", "without_signal", "kl", "clipped", "mismatch")
_EVALUATION = ("loss", "perplexity", "exact_match")
# What wandb would record beside what it is given: the repository, the command line with its arguments, the screen.
_WANDB = {
    "silent": True,
    "disable_git": True,
    "save_code": False,
    "console": "off",
    "x_disable_meta": True,
    "x_disable_stats": True,
}


def check_installed(sinks: Sequence[str]) -> None:
    """Raises UserError for a tracker that is asked for and is not installed: before anything long starts."""
    for name in sinks:
        if name in PACKAGES and not any(map(_is_installed, PACKAGES[name])):
            hint = f"pip install {name}, or take it out of report.sinks"
            raise UserError(f"report.sinks: the tracker {name} is not installed", hint)


def _is_installed(package: str) -> bool:
    """By what was installed: a folder `wandb`, which wandb itself leaves behind, could be imported as well."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


class TrackerSink:
    """A sink that hands steps and evaluations to a tracker. `step` is the step that the run goes on after."""

    def __init__(self, name: str, recipe: Recipe, run_dir: Path, step: int, screen: Sink) -> None:
        self.name, self.run_dir, self.screen = name, run_dir, screen
        self._recipe, self._step = recipe, step
        self._tracker: Any = None
        self._sent: Sent | None = None
        self._has_failed = False

    def emit(self, event: Event) -> None:
        if not self._has_failed:
            self._trying(lambda: self._take(event))

    def close(self) -> None:
        if self._tracker is not None and not self._has_failed:
            self._trying(self._tracker.finish)
        if self._sent is not None:
            self._sent.close()

    def _trying(self, work: Callable[[], None]) -> None:
        # Some print what they do: the screen is drawn by another sink.
        with foreign_failures(memory_too=True) as failure, redirect_stdout(StringIO()):
            work()
        if failure.error is not None:
            self._has_failed = True
            self.screen.emit(Notice("tracker", f"{self.name} failed and gets no more of this run ({failure.reason})"))

    def _take(self, event: Event) -> None:
        if isinstance(event, Start) and self._tracker is None:
            self._open()
        elif isinstance(event, StepDone):
            self._log("train", event.step, {key: getattr(event, key) for key in _STEP})
        elif isinstance(event, Preferred):
            side = "preference_eval" if event.evaluated else "preference"
            self._log(side, event.step, {key: getattr(event, key) for key in _PREFERENCE})
        elif isinstance(event, Rewarded):
            # Not every tracker takes every name, and a pattern may have anything in it.
            names = (
                f"reward_{number}_{re.sub(r'[^a-zA-Z0-9]+', '_', name)[:40]}"
                for number, name in enumerate(event.rewards, 1)
            )
            of_each = dict(zip(names, event.rewards.values(), strict=True))
            side = "rewards_eval" if event.evaluated else "rewards"
            self._log(side, event.step, {**{key: getattr(event, key) for key in _REWARDS}, **of_each})
        elif isinstance(event, Evaluated):
            self._log("eval", event.step, {key: getattr(event, key) for key in _EVALUATION})

    def _log(self, side: str, step: int, values: Mapping[str, float | None]) -> None:
        if self._tracker is None or self._sent is None or step <= self._sent.last(side):
            return
        known = {f"{side}/{key}": value for key, value in values.items() if value is not None}
        if known:
            self._tracker.log(known, step=step)
            self._sent.add(side, step)

    def _open(self) -> None:
        folder = self.run_dir / FOLDER
        files.refuse_links(self.run_dir, folder)
        folder.mkdir(exist_ok=True)
        self._sent = Sent(folder / f"{self.name}.steps", _fingerprint(self._recipe), self._step)
        known = self._sent.run
        tracker, where = start(self.name, self.run_dir, known or uuid.uuid4().hex, is_new=known is None)
        self._tracker = tracker
        if known is None:
            self._sent.begin(_id_of(self.name, tracker))
            tracker.store_init_configuration(configuration(self._recipe))
        self.screen.emit(Notice("tracker", f"{self.name}: {where}"))


class Sent:
    """What a run of a tracker has got: its id and recipe on the first line, then a line a step (`train 7`)."""

    def __init__(self, path: Path, fingerprint: str, step: int) -> None:
        self.path = path
        self.run: str | None = None
        self._fingerprint = fingerprint
        self._last = dict.fromkeys(_SIDES, -1)
        self._file: FileIO | None = None
        if path.exists() and self._read(goes_on=step > 0):
            self._file = disk.open_to_write(path, "append")

    def last(self, side: str) -> int:
        """The last step that was sent; -1 before the first."""
        return self._last[side]

    def begin(self, run: str) -> None:
        """A new run of the tracker."""
        self.run, self._last = run, dict.fromkeys(_SIDES, -1)
        self._file = disk.open_to_write(self.path, "replace")
        files.write_all(self._file, f"{run} {self._fingerprint}\n".encode())

    def add(self, side: str, step: int) -> None:
        """A step that the tracker has."""
        self._last[side] = step
        if self._file is not None:
            files.write_all(self._file, f"{side} {step}\n".encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, goes_on: bool) -> bool:
        """Whether a run of the tracker can be gone on with: of a run that begins anew only by the same recipe."""
        with files.open_to_read(self.path, _MAX_RECORD_BYTES) as lines:
            run, _, fingerprint = lines.readline(200).decode(errors="replace").strip().partition(" ")
            if not run.isalnum() or not (goes_on or fingerprint == self._fingerprint):
                return False
            while line := lines.readline(200):
                side, _, step = line.decode(errors="replace").partition(" ")
                if side in self._last and step[:-1].isdecimal() and len(step) < 18 and step.endswith("\n"):
                    self._last[side] = max(self._last[side], int(step))
        self.run = run
        return True


def start(name: str, run_dir: Path, run: str, *, is_new: bool) -> tuple[Any, str]:
    """A tracker of accelerate's, started in the run `run` of its own, and where its user finds what it keeps."""
    from accelerate import PartialState, tracking

    PartialState()  # which its logger asks for
    folder = run_dir / FOLDER
    made: Any
    if name == "tensorboard":
        made = tracking.TensorBoardTracker(name, folder)
        where = f"its files are in {folder / name}"
    elif name == "wandb":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        settings = {"dir": str(folder), "id": run, "resume": "allow", "name": run_dir.name, "settings": _WANDB}
        made = tracking.WandBTracker(PROJECT, mode="offline", **settings)
        where = f"kept on this disk in {folder / name}; `wandb sync` sends it where you have an account"
    elif name == "mlflow":
        where = _mlflow_place(folder)
        made = tracking.MLflowTracker(PROJECT, run_id=None if is_new else run, run_name=run_dir.name)
    else:
        made = tracking.TrackioTracker(PROJECT, name=f"{run_dir.name}-{run[:8]}", resume="allow")
        where = "kept in its own store on this disk; `trackio show` draws it"
    made.start()
    return made, where


def _mlflow_place(folder: Path) -> str:
    """Where mlflow keeps the run: in the run's folder, unless its user has named a place."""
    place, own = os.environ.get("MLFLOW_TRACKING_URI", ""), f"{FOLDER}/mlflow.db"
    if place and not place.endswith(own):  # mlflow itself names there what an earlier run of this process set
        return f"kept where MLFLOW_TRACKING_URI says: {place}"
    import mlflow

    place = f"sqlite:///{folder.parent / own}"
    mlflow.set_tracking_uri(place)
    return f"kept in {place}"


def _id_of(name: str, tracker: Any) -> str:
    """What the tracker calls the run that it has begun: mlflow and trackio go by their own names of it."""
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    if name == "trackio":
        return str(tracker.init_kwargs["name"]).rpartition("-")[2]
    return str(tracker.init_kwargs.get("id", "")) or uuid.uuid4().hex


def configuration(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """The recipe as a tracker stores it: one level, plain values, no secret and no folder of the user's machine."""
    values: dict[str, str | int | float | bool] = {}
    for key, text in flattened(recipe.model_dump(mode="json", exclude_none=True)).items():
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        plain = value if isinstance(value, str | int | float | bool) else text
        values[key] = plain_values(redact_all(plain))
    return values


def _fingerprint(recipe: Recipe) -> str:
    values = recipe.model_dump(mode="json", exclude=set(FREE_SECTIONS))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
