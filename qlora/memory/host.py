"""Memory of a process that trains without a GPU: what it holds before the base is loaded, and what a run adds.

What the imports take differs by a factor of two between builds of torch and versions of Python (490 MiB for the CPU
build on Python 3.11, 0.8 GiB for the CUDA build on 3.13), so the process is asked. A run adds its live tensors, and
three things that no tensor shows; the figures are of two bases on a Linux with glibc (`python tools/bench/host.py`).
"""

from __future__ import annotations

import psutil

from qlora.heap import MOST_KERNELS
from qlora.units import MIB

# What reading rows adds to a process that has only estimated: tokenizers, Arrow and its threads, the template's child
# (131 to 175 MiB between a simulation's end and the first weight that is read).
READING_BYTES = 160 * MIB
# By its first steps a run has paged in the libraries' kernels and has its pools, threads and Python's objects.
RUNNING_BYTES = 120 * MIB
# A run that answers questions generates in shapes of its own, and leaves holes in the heap of blocks under a MiB: what
# the quickstart, whose tensors are all that small, has after 40 steps (after 5 of them: 45 less).
ANSWERING_BYTES = 60 * MIB
# A compiled kernel of oneDNN's: with room for 1,024 the peak was 61 MiB above that with room for 8, after 12 rows of a
# 135M base. heap.settle bounds how many are kept; a width has about 20 shapes.
KERNEL_BYTES = 110 << 10
KERNELS_OF_WIDTH = 20
# Blocks that the C library cannot give back.
FRAGMENTATION_SHARE = 0.02


def held_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def added_bytes(live: int, widths: int, answers: bool, copied: int) -> int:
    """What a run with `live` bytes of tensors and batches of so many different widths adds beside those tensors.

    `copied` bytes are a copy of its state, which a thread writes to the disk while the next steps are at their peak.
    """
    kernels = min(MOST_KERNELS, KERNELS_OF_WIDTH * widths) * KERNEL_BYTES
    running = RUNNING_BYTES + (ANSWERING_BYTES if answers else 0)
    return running + kernels + copied + round(live * FRAGMENTATION_SHARE)
