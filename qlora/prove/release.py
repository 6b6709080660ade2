"""After a run nothing of it is left in the device's memory, so that what follows has it."""

from __future__ import annotations

import weakref

from qlora import device as hardware
from qlora.model.cpu_matmul import fast_matmul
from qlora.prove.model import make, packed
from qlora.prove.proof import Outcome, Place, Proof
from qlora.prove.shapes import with_layers


def run(place: Place) -> Outcome:
    shape = with_layers(place.shape, 2)
    hardware.release(place.device)
    before = hardware.live_bytes(place.device) or 0
    with make(shape, place.device) as made, fast_matmul(place.device):
        made.step(packed(1, place.length, shape.vocabulary))
        watched = [weakref.ref(parameter) for parameter in made.model.parameters()]
        during = hardware.live_bytes(place.device) or 0
    del made
    hardware.release(place.device)
    alive, left = sum(one() is not None for one in watched), (hardware.live_bytes(place.device) or 0) - before
    said = f"{alive} of {len(watched)} tensors alive, {max(0, left):,} bytes of {during - before:,} left"
    measured = {"tensors": len(watched), "alive": alive, "bytes_left": left, "bytes_during": during - before}
    return Outcome(alive == 0 and left <= LEFT_BYTES, said, measured)


LEFT_BYTES = 80 << 20  # cuBLAS' workspaces stay: 32 MiB a handle, of the forward and of the backward thread, and tables
PROOF = Proof(
    name="release",
    promise="a run's memory is given back before anything else is loaded",
    tolerance=f"no tensor alive, {LEFT_BYTES >> 20} MiB of cuBLAS' workspaces",
    source="device.release; cuBLAS keeps a workspace a handle (ATen/cuda/CUDABlas.cpp)",
    run=run,
)
