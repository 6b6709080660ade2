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
RUNNING_BYTES = 95 * MIB
# A run that answers questions generates in shapes of its own, and leaves holes in the heap of blocks under a MiB.
ANSWERING_BYTES = 10 * MIB
# A compiled kernel with its plan: 388 MiB for 600 shapes of a small layer. heap.settle bounds how many are kept; a
# width has about 20 shapes.
KERNEL_BYTES = 600 << 10
KERNELS_OF_WIDTH = 20
# A study and its exam: prompts and answers as Python's objects, labels, a search over all passages.
STUDY_BYTES = 20 * MIB
# Blocks that the C library cannot give back.
FRAGMENTATION_SHARE = 0.02


def held_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def added_bytes(live: int, widths: int, answers: bool, asks: bool = False) -> int:
    """What a run with `live` bytes of tensors and batches of so many different widths adds beside those tensors.

    `asks`: it studies documents.
    """
    widths = MOST_KERNELS if asks else widths
    kernels = min(MOST_KERNELS, KERNELS_OF_WIDTH * widths) * KERNEL_BYTES
    running = RUNNING_BYTES + (ANSWERING_BYTES if answers or asks else 0) + (STUDY_BYTES if asks else 0)
    return running + kernels + round(live * FRAGMENTATION_SHARE)
