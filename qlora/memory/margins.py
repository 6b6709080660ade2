"""How far an estimate may be off, cause by cause: what past errors earned.

The figures are of `python tools/bench/peaks.py`, which predicts published runs; those called fitting gave them.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora.memory.calibration import Correction
from qlora.units import MIB

# Live tensors: of 59 fitting runs the worst was under by 1.1 %; a constant, because what loading leaves
# behind in the allocator differs by 20 MiB from one load of the same base to the next.
TENSOR_SHARE, TENSOR_BYTES = 0.015, 24 * MIB
# Blocks that do not fit. Weights lie where they are for good: of the rest the replayed allocator was under by up to
# 18 % in 59 runs of a plain loop (their second step), and by 10 to 18 % in nine runs of transformers' Trainer whose
# card's driver was asked (100 steps), up to 16 % of it beyond what the other causes earn. Where a stack casts
# what it has loaded, the blocks that this frees are gaps too: of one load in seven half of them were never used again.
GAP_SHARE, CAST_SHARE = 0.165, 0.30
# From this many runs on the same card on, their own spread stands for that of tensors elsewhere; never less than this.
RUNS_THAT_COUNT = 3
LEAST_SHARE = 0.002
# Without a GPU: resident memory of a base of 5M and one of 135M, on rows of four lengths, against what was predicted.
HOST_SHARE, HOST_BYTES = 0.03, 8 * MIB


@dataclass(frozen=True)
class Gaps:
    """What the allocator's gaps depend on: bytes of the base, of it those that were there in another dtype first."""

    weights: int
    cast: int


def of_tensors(tensors: int, correction: Correction) -> int:
    """Bytes by which live tensors may take more than predicted; `tensors` are those at the peak."""
    if correction.runs >= RUNS_THAT_COUNT:
        return round(tensors * max(LEAST_SHARE, correction.spread))
    return round(tensors * TENSOR_SHARE) + TENSOR_BYTES


def of_gaps(tensors: int, gaps: Gaps) -> int:
    """Bytes by which blocks that do not fit may take more than the replayed allocator says."""
    return round((tensors - gaps.weights) * GAP_SHARE + gaps.cast * CAST_SHARE)


def on_host(taken: int, copied: int) -> int:
    """Of a process without a GPU; `taken` is what the run takes beside what the process held before.

    `copied` of a state are held while a thread writes it, which may last into the highest moment of the next step.
    """
    return round(taken * HOST_SHARE) + HOST_BYTES + copied
