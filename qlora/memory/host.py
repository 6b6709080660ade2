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
# By its first steps a run has paged in kernels of libraries (12 MiB) and has its threads and objects of Python; of the
# 8 MiB that `heap.py` keeps at the heap's end four runs had 1 to 7 more than with one.
RUNNING_BYTES = 31 * MIB
# A run that answers questions generates in shapes of its own, and leaves holes of other sizes.
ANSWERING_BYTES = 8 * MIB
# A compiled kernel with its plan, and the holes that its making leaves: 538 to 586 KiB as the C library counts, some
# kept twice; 32 more took 34 MiB of resident memory. Every run has as many shapes as heap.settle lets it keep.
KERNEL_BYTES = 1080 << 10
# A study and its exam: prompts and answers as Python's objects, labels, a search over all passages.
STUDY_BYTES = 20 * MIB
# In the heap of blocks under a MiB (`heap.py`) tensors of a run's phases leave holes to each other, over its first ten
# steps: of a base of 135M 16 % of the live tensors on packed rows of 512 tokens, 10 % on unpacked ones and on two rows
# of 256, 6 % on 1,024, most of whose tensors lie outside of the heap.
FRAGMENTATION_SHARE = 0.17


def held_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def added_bytes(live: int, answers: bool, asks: bool = False) -> int:
    """What a run with `live` bytes of tensors adds beside them. `asks`: it studies documents."""
    running = RUNNING_BYTES + (ANSWERING_BYTES if answers or asks else 0) + (STUDY_BYTES if asks else 0)
    return running + MOST_KERNELS * KERNEL_BYTES + round(live * FRAGMENTATION_SHARE)
