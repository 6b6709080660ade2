"""`--verify-resume`: the proof, on the user's own machine, that a resumed run is the run that was never stopped.

Two processes, a few steps each, with the user's own recipe: the first trains to the end and saves on the way, the
second is given that half-way checkpoint and nothing else. What both end with is compared tensor by tensor, tolerance 0;
of runs that are exact to rounding only (train.deterministic = false) the masters are compared, within TOLERANCE.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qlora import child_process, run_folder
from qlora.errors import TrainingStopped
from qlora.events import Progress, Sink
from qlora.recipe.reading import Recipe, recipe_toml
from qlora.training.checkpoint import at_step, folder_of

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 6
HALF = 3
EVALUATE_EVERY = 2  # so that evaluations lie before and after the stop
# Of the distance that the masters move after the stop. Sums in another order round some of a gradient's bf16 values
# otherwise, by up to 2^-8, and turn the sign of those near 0; lost moments would be a third and more.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Proof:
    """What was compared: `tensors` of adapter and optimizer after `steps`, one side resumed from `resumed_from`.

    `apart` is None where all are equal bit for bit; to rounding, how far the masters are apart, as a share of how far
    they moved after the stop.
    """

    tensors: int
    steps: int
    resumed_from: int
    apart: float | None = None

    def __str__(self) -> str:
        end = f"step {self.steps}, uninterrupted and resumed from step {self.resumed_from} in a new process"
        if self.apart is None:
            return f"resume is exact: {self.tensors} tensors of adapter and optimizer are equal bit for bit after {end}"
        moved = f"{self.apart:.2%} of what they moved since, {TOLERANCE:.0%} are allowed (train.deterministic = false)"
        return f"resume is right to rounding: {self.tensors} master tensors after {end} differ by {moved}"


def verify_resume(recipe: Recipe, name: str, sink: Sink, rewards: Sequence[str] = ()) -> Proof:
    """Raises TrainingStopped when the two runs differ, and whatever error the runs themselves end with. `rewards`:
    functions that judge answers, as the command takes them."""
    judged = [word for one in rewards for word in ("--rewards", one)]
    with TemporaryDirectory(prefix="qlora-verify-resume-") as place:
        straight, resumed = Path(place) / "straight", Path(place) / "resumed"
        sink.emit(Progress("uninterrupted run", 0, 1))
        _train(recipe, straight, name, *judged)
        target = resumed / name
        half = folder_of(target, HALF)
        shutil.copytree(folder_of(straight / name, HALF), half)
        shutil.copyfile(straight / name / run_folder.RECIPE_FILE, target / run_folder.RECIPE_FILE)
        sink.emit(Progress("resumed run", 0, 1))
        _train(recipe, resumed, name, "--resume", *judged)
        ends = folder_of(straight / name, STEPS), folder_of(target, STEPS)
        saved = at_step(straight / name, STEPS)
        if saved and saved.state.numerics and saved.state.numerics.deterministic is False:
            return _compare_to_rounding(half, *ends)
        return _compare(*ends)


def short(recipe: Recipe, out: Path) -> Recipe:
    """The recipe, all that decides a step as it is, for a few steps into another folder."""
    changes: dict[str, dict[str, Any]] = {
        "train": {"max_steps": STEPS, "epochs": None, "max_minutes": None},
        "checkpoint": {"every_steps": HALF, "keep": 2},
        "eval": {"every_steps": EVALUATE_EVERY, "early_stopping_patience": 0, "samples": 0, "exact_match_rows": 0},
        "report": {"sinks": ("jsonl",)},
        "export": {"formats": ()},
        "output": {"dir": str(out)},
    }
    sections = {name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()}
    return recipe.model_copy(update=sections)


def _train(recipe: Recipe, out: Path, name: str, *flags: str) -> None:
    out.mkdir(exist_ok=True)
    file = out / f"{name}.toml"
    file.write_text(recipe_toml(short(recipe, out)), encoding="utf-8")
    command = child_process.command("qlora.cli.train", str(file), *flags)
    with child_process.life_line() as line:
        done = subprocess.run(command, stdin=line, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.strip().splitlines()] or [f"exit code {done.returncode}"]
        first = next((number for number, line in enumerate(lines) if line.startswith("error: ")), len(lines) - 1)
        hint = lines[first + 1] if first + 1 < len(lines) else "run the recipe itself to see more"
        error = TrainingStopped(lines[first].removeprefix("error: "), hint)
        error.exit_code = done.returncode if done.returncode > 0 else 128 - done.returncode  # as shells count signals
        raise error


def _compare(one: Path, other: Path) -> Proof:
    from safetensors.torch import load_file

    compared = 0
    differing: dict[str, float] = {}
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(one / file), load_file(other / file)
        compared += len(ours)
        for name in sorted({*ours, *theirs}):
            if (distance := _distance(ours.get(name), theirs.get(name))) is not None:
                differing[name] = distance
    if differing:
        raise TrainingStopped(
            f"a resumed run is not the same: {len(differing)} of {compared} tensors differ, {next(iter(differing))} "
            f"first, by at most {max(0.0, *differing.values()):.3g}",
            "please report it with this recipe and the versions in runs/…/events.jsonl",
        )
    return Proof(compared, STEPS, HALF)


def _compare_to_rounding(half: Path, one: Path, other: Path) -> Proof:
    from safetensors.torch import load_file

    began, ours, theirs = (load_file(folder / "optimizer.safetensors") for folder in (half, one, other))
    names = sorted(name for name in ours if name.startswith("master/"))
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in names)
    moved = sum(float((ours[name] - began[name]).double().square().sum()) for name in names)
    share = (apart / moved) ** 0.5 if moved else float("inf") if apart else 0.0
    if share > TOLERANCE:
        raise TrainingStopped(
            f"a resumed run is not the same: its masters differ by {share:.2%} of what they moved after the stop, "
            f"{TOLERANCE:.0%} are allowed",
            "please report it with this recipe and the versions in runs/…/events.jsonl",
        )
    return Proof(len(names), STEPS, HALF, share)


def _distance(one: Tensor | None, other: Tensor | None) -> float | None:
    """The largest difference of two values; None where every bit is the same."""
    import torch

    if one is None or other is None or one.shape != other.shape:
        return float("inf")
    if one.dtype == other.dtype and torch.equal(one, other):
        return None
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
