"""Whether what the card has no room for goes to RAM without a word, which slows a run down many times."""

from __future__ import annotations

import torch

from qlora import device as hardware
from qlora.prove.proof import Figure, Outcome, Place, Proof, not_here

PIECE = 256 << 20
BEYOND = 1 << 30  # of what the driver calls free


def run(place: Place) -> Outcome:
    if not place.on_card:
        return not_here("a CPU has no memory of its own")
    hardware.release(place.device)
    hardware.limit_memory(place.device, None, 0)
    free, held, refused = hardware.free_bytes(place.device), list[torch.Tensor](), False
    try:
        while len(held) * PIECE < free + BEYOND:
            held.append(torch.empty(PIECE, dtype=torch.uint8, device=place.device))
    except torch.OutOfMemoryError:
        refused = True
    finally:
        taken = len(held) * PIECE
        held.clear()
        hardware.release(place.device)
        hardware.lift_limit(place.device)
    measured: dict[str, Figure] = {"free_bytes": free, "taken_bytes": taken, "may_spill": hardware.may_spill()}
    said = f"{taken >> 20:,} MiB of {free >> 20:,} free were given, then " + ("refused" if refused else "even more")
    return Outcome(refused and taken <= free, said, measured)


PROOF = Proof(
    name="spilling",
    promise="what does not fit is refused, and never moved to RAM in silence",
    tolerance="not one piece of 256 MiB beyond what the driver calls free",
    source="WDDM's and WSL's drivers move it (microsoft/WSL#11050); device.limit_memory",
    run=run,
)
