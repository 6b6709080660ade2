"""The predicted peak beside the measured one, of a model of real size on a GPU, of a small one on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from qlora import device as hardware
from qlora.memory import hardware as machines
from qlora.memory import host
from qlora.memory.estimate import Estimate, Estimator
from qlora.model.cpu_matmul import fast_matmul
from qlora.prove.model import make, packed
from qlora.prove.proof import Figure, Outcome, Place, Proof
from qlora.prove.shapes import config_of, with_layers
from qlora.recipe.reading import Recipe
from qlora.units import MIB

STEPS, MICRO_STEPS = 3, 2  # the second update finds the moments in place, the third changes nothing
TENSORS = (0.98, 1.05)  # predicted over counted: what tensors take is a sum, and no guess
OVER = 1.15  # predicted over measured, fragments included
HOST_SLACK_BYTES = 64 << 20  # what threads' arenas of a CPU's allocator take, which no tensor shows
LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class Setting:
    """What a recipe chooses that changes memory. `part` is of the place's length."""

    rows: int
    part: float
    recompute: bool
    optimizer: str

    def named(self, place: Place) -> str:
        layers = "recomputed" if self.recompute else "kept"
        return f"{self.rows} x {int(place.length * self.part):,} tokens, {layers}, {self.optimizer}"


SETTINGS = (
    Setting(1, 1.0, True, "adamw_8bit"),
    Setting(2, 0.5, True, "adamw"),
    Setting(1, 0.25, False, "paged_adamw_8bit"),
)


def run(place: Place) -> Outcome:
    _warm_up(place)
    held, said, measured = [], [], dict[str, Figure]()
    for setting in SETTINGS if place.on_card else SETTINGS[:1]:
        hardware.release(place.device)
        estimate, name = predicted(place, setting), setting.named(place)
        if not estimate.fits:
            said.append(f"{name}: it needs {estimate.needed_bytes // MIB:,} MiB, and was not tried")
            continue
        outcome = _measured(place, setting, estimate)
        held.append(bool(outcome.holds))
        said.append(f"{name}: {outcome.said}")
        measured |= {f"{name}: {key}": value for key, value in outcome.measured.items()}
    return Outcome(all(held) if held else None, "; ".join(said), measured)


def _measured(place: Place, setting: Setting, estimate: Estimate) -> Outcome:
    free, resident = hardware.free_bytes(place.device), host.held_bytes()
    making = make(place.shape, place.device, optimizer=setting.optimizer, recompute=setting.recompute)
    with making as made, fast_matmul(place.device), _highest_resident() as highest:
        batch = packed(setting.rows, int(place.length * setting.part), place.shape.vocabulary)
        for _ in range(STEPS):
            made.step(*[batch] * MICRO_STEPS)
        hardware.synchronize(place.device)
        counted, taken = hardware.peak_bytes(place.device), free - hardware.free_bytes(place.device)
    return _on_cpu(estimate, highest[0] - resident) if counted is None else _on_card(estimate, counted, taken)


def _warm_up(place: Place) -> None:
    """A step of one layer: what libraries import and set up for the first one is not the run's."""
    shape = with_layers(place.shape, 1)
    with make(shape, place.device) as made, fast_matmul(place.device):
        made.step(packed(1, 32, shape.vocabulary))


def predicted(place: Place, setting: Setting) -> Estimate:
    """The estimate of the steps that are run: no evaluation, no samples."""
    recipe = Recipe.model_validate(
        {
            "model": {"base": place.shape.name},
            "data": {"max_length": int(place.length * setting.part), "eval_fraction": 0.0},
            "train": {
                "micro_batch_size": setting.rows,
                "gradient_checkpointing": setting.recompute,
                "optimizer": setting.optimizer,
            },
        }
    )
    return Estimator(config_of(place.shape), place.shape.name, machines.this_machine()).estimate(recipe)


def _on_card(estimate: Estimate, counted: int, taken: int) -> Outcome:
    """`counted` is of the allocator's tensors, `taken` what of the card's free memory is gone, fragments too."""
    whole = estimate.peak_bytes - estimate.components["context"]
    tensors = estimate.tensor_bytes / counted
    measured: dict[str, Figure] = {
        "predicted_tensor_bytes": estimate.tensor_bytes,
        "measured_tensor_bytes": counted,
        "predicted_bytes_above_context": whole,
        "measured_bytes_above_context": taken,
        "error_bytes": estimate.error_bytes,
    }
    said = f"tensors {estimate.tensor_bytes // MIB:,} MiB said, {counted // MIB:,} measured ({tensors:.3f}), "
    said += f"with fragments {whole // MIB:,} ± {estimate.error_bytes // MIB:,} and {taken // MIB:,}"
    holds = TENSORS[0] <= tensors <= TENSORS[1] and whole / OVER <= taken <= whole + estimate.error_bytes
    return Outcome(holds, said, measured)


def _on_cpu(estimate: Estimate, taken: int) -> Outcome:
    whole = estimate.peak_bytes - estimate.components["context"]
    measured: dict[str, Figure] = {"predicted_bytes_above_imports": whole, "measured_bytes_above_imports": taken}
    measured["error_bytes"] = estimate.error_bytes
    said = f"{whole / MIB:,.0f} MiB said above what the process held before, {taken / MIB:,.0f} measured"
    return Outcome(taken <= whole + estimate.error_bytes + HOST_SLACK_BYTES, said, measured)


@contextmanager
def _highest_resident() -> Iterator[list[int]]:
    """The largest resident set that was seen inside, in a list of one: a look every few milliseconds."""
    process, done = psutil.Process(), threading.Event()
    highest = [process.memory_info().rss]

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield highest
    finally:
        done.set()
        watcher.join()


PROOF = Proof(
    name="memory",
    promise="what a run takes is predicted, and not less than it takes",
    tolerance=f"tensors {TENSORS[0]} to {TENSORS[1]} of those counted; with fragments measured <= said + error, "
    f"said <= {OVER} of it; on a CPU at most {HOST_SLACK_BYTES >> 20} MiB beyond",
    source="qlora-estimate; the allocator's own counters (torch.cuda.max_memory_allocated)",
    run=run,
)
