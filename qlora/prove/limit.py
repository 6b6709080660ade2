"""Memory runs out at the limit that was set, by torch's own error, and the step is done with smaller micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qlora import device as hardware
from qlora.batch import Batch
from qlora.data.loader import collate
from qlora.events import Recorder
from qlora.prove.model import Made, documents, make
from qlora.prove.proof import Figure, Outcome, Place, Proof, distance, not_here
from qlora.prove.shapes import with_layers
from qlora.training.memory_plan import MemorySettings
from qlora.training.recovery import OomRecovery

ROWS = 4
TOLERANCE = 0.03  # as of attention: the same sum over the same rows, in bf16 and another order


def run(place: Place) -> Outcome:
    if not place.on_card:
        return not_here("a CPU has no allocator with a limit")
    shape, recorder = with_layers(place.shape, 2), Recorder()
    hardware.release(place.device)
    recovery = OomRecovery(MemorySettings(ROWS, True), place.device, recorder, lambda _: None)
    with make(shape, place.device) as made:
        wanted, many = _peak_of(made, _batches(place, ROWS))
        _, few = _peak_of(made, _batches(place, 1))
        hardware.limit_memory(place.device, (few + many) // 2, 0)
        try:
            found = recovery.run(
                1,
                lambda: made.gradient(*_batches(place, recovery.settings.micro_batch_size)),
                made.optimizer.zero_gradients,
            )
        finally:
            hardware.lift_limit(place.device)
    apart = distance(found, wanted)
    measured: dict[str, Figure] = {"rows_at_once": recovery.settings.micro_batch_size, "apart": apart}
    measured |= {"recovered": len(recorder.of("recovered")), "bytes_of_one_row": few, "bytes_of_all": many}
    said = f"{ROWS} rows at once did not fit, {recovery.settings.micro_batch_size} did; {apart:.2%} apart"
    return Outcome(bool(recorder.of("recovered")) and apart <= TOLERANCE, said, measured)


def _batches(place: Place, rows: int) -> list[Batch]:
    """The same packs in micro-batches of `rows`."""
    parts = (place.length // 2, place.length // 3)
    split = documents(ROWS, parts, place.shape.vocabulary)
    packs = [(2 * number, 2 * number + 1) for number in range(ROWS)]
    return [collate(split, packs[start : start + rows], 0, place.length) for start in range(0, ROWS, rows)]


def _peak_of(made: Made, batches: Sequence[Batch]) -> tuple[list[Tensor], int]:
    """The gradient, and the most bytes that were live at a time."""
    hardware.release(made.device)
    return made.gradient(*batches), hardware.peak_bytes(made.device) or 0


PROOF = Proof(
    name="memory limit",
    promise="out of memory is raised at the limit, and the same rows are done again in smaller micro-batches",
    tolerance=f"recovered at least once; {TOLERANCE:.0%} of the gradient's norm",
    source="torch.cuda.set_per_process_memory_fraction; training/recovery.py",
    run=run,
)
