"""What the driver keeps of a card for this process: by its first kernel, and by a step of training."""

from __future__ import annotations

from qlora import device as hardware
from qlora.memory.hardware import this_machine
from qlora.memory.overheads import context_bytes
from qlora.prove.model import make, packed
from qlora.prove.proof import Figure, Outcome, Place, Proof, not_here
from qlora.prove.shapes import with_layers
from qlora.units import MIB


def run(place: Place) -> Outcome:
    if not place.on_card:
        return not_here("a CPU has no context")
    hardware.release(place.device)
    first, before = hardware.measured_context(), hardware.beyond_allocator(place.device)
    shape = with_layers(place.shape, 1)
    with make(shape, place.device) as made:
        made.step(packed(1, place.length, shape.vocabulary))
        hardware.synchronize(place.device)
    hardware.release(place.device)
    grown = hardware.beyond_allocator(place.device) - before
    expected, margin = context_bytes(this_machine().gpu)
    measured: dict[str, Figure] = {"context_bytes_by_first_kernel": first, "context_bytes_grown_by_a_step": grown}
    measured |= {"predicted_bytes": expected, "error_bytes": margin}
    said = f"{expected // MIB:,} ± {margin // MIB:,} MiB said"
    if first is None:
        return Outcome(None, f"{said}; nobody looked at what was free before it", measured)
    said += f", {first / MIB:,.0f} measured by the first kernel and {grown / MIB:,.0f} more by a step"
    return Outcome(first + grown <= expected + margin, said, measured)


PROOF = Proof(
    name="context",
    promise="what the driver keeps for the process is predicted, and not less than it keeps",
    tolerance="the margin of the kind of card",
    source="free memory before the process had a context, after its first kernel and after a step",
    run=run,
)
