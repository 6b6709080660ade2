"""The predicted peak beside the measured one, of a model of real size on a GPU, of a small one on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from qlora import device as hardware
from qlora.memory import hardware as machines
from qlora.memory.estimate import Estimate, Estimator
from qlora.model.cpu_matmul import fast_matmul
from qlora.prove.model import make, packed
from qlora.prove.proof import Figure, Outcome, Place, Proof
from qlora.prove.shapes import config_of, with_layers
from qlora.recipe.reading import Recipe

OPTIMIZER = "adamw_8bit"
STEPS, MICRO_STEPS = 3, 2  # the second update finds the moments in place, the third changes nothing
UNDER, OVER = 0.98, 1.05
HOST_SLACK_BYTES = 64 << 20  # what threads' arenas of a CPU's allocator take, which no tensor shows
LOOK_SECONDS = 0.005
MIB = 1 << 20


def run(place: Place) -> Outcome:
    _warm_up(place)
    hardware.release(place.device)
    estimate = predicted(place)
    free, resident = hardware.free_bytes(place.device), psutil.Process().memory_info().rss
    made = make(place.shape, place.device, optimizer=OPTIMIZER)
    batch = packed(1, place.length, place.shape.vocabulary)
    with fast_matmul(place.device), _highest_resident() as highest:
        for _ in range(STEPS):
            made.step(*[batch] * MICRO_STEPS)
        hardware.synchronize(place.device)
    counted = hardware.peak_bytes(place.device)
    if counted is None:
        return _on_cpu(estimate, highest[0] - resident)
    return _on_card(estimate, counted, free - hardware.free_bytes(place.device))


def _warm_up(place: Place) -> None:
    """A step of one layer: what libraries import and set up for the first one is not the run's."""
    shape = with_layers(place.shape, 1)
    with fast_matmul(place.device):
        make(shape, place.device, optimizer=OPTIMIZER).step(packed(1, 32, shape.vocabulary))


def predicted(place: Place) -> Estimate:
    """The estimate of the steps that `run` takes: no evaluation, no samples."""
    recipe = Recipe.model_validate(
        {
            "model": {"base": place.shape.name},
            "data": {"max_length": place.length, "eval_fraction": 0.0},
            "train": {"micro_batch_size": 1, "gradient_checkpointing": True, "optimizer": OPTIMIZER},
        }
    )
    return Estimator(config_of(place.shape), place.shape.name, machines.this_machine()).estimate(recipe)


def _on_card(estimate: Estimate, counted: int, taken: int) -> Outcome:
    """`counted` is of the allocator's tensors, `taken` what of the card's free memory is gone, fragments too."""
    whole = estimate.peak_bytes - estimate.components["context"]
    tensors, process = estimate.tensor_bytes / counted, whole / max(taken, 1)
    measured: dict[str, Figure] = {
        "predicted_tensor_bytes": estimate.tensor_bytes,
        "measured_tensor_bytes": counted,
        "predicted_bytes_above_context": whole,
        "measured_bytes_above_context": taken,
        "predicted_peak_bytes": estimate.peak_bytes,
    }
    said = f"tensors {estimate.tensor_bytes // MIB:,} MiB said, {counted // MIB:,} measured ({tensors:.3f}); "
    said += f"with what the allocator keeps {whole // MIB:,} said, {taken // MIB:,} measured ({process:.3f})"
    return Outcome(UNDER <= tensors <= OVER and process >= UNDER, said, measured)


def _on_cpu(estimate: Estimate, taken: int) -> Outcome:
    whole = estimate.peak_bytes - estimate.components["context"]
    measured: dict[str, Figure] = {"predicted_bytes_above_imports": whole, "measured_bytes_above_imports": taken}
    said = f"{whole / MIB:,.0f} MiB above what the process held before, {taken / MIB:,.0f} measured"
    return Outcome(taken <= whole + HOST_SLACK_BYTES, said, measured)


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
    tolerance=f"tensors {UNDER} to {OVER} of those measured, with fragments not under {UNDER}; "
    f"on a CPU not more than {HOST_SLACK_BYTES >> 20} MiB under",
    source="qlora-estimate; the allocator's own counters (torch.cuda.max_memory_allocated)",
    run=run,
)
