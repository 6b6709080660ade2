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
# By its first steps a run has paged in kernels of libraries (12 to 17 MiB), has its threads and objects of Python, and
# keeps up to 8 MiB at the heap's end. Runs that answer questions take no more than those that do not.
RUNNING_BYTES = 24 * MIB
# A compiled kernel with its plan: 538 to 586 KiB as the C library counts, some kept twice, and holes that its making
# leaves. Set by what the quickstart takes in the end. Every run has as many shapes as heap.settle lets it keep.
KERNEL_BYTES = 800 << 10
# A study and its exam: prompts and answers as Python's objects, labels, a search over all passages.
STUDY_BYTES = 20 * MIB
# In the heap of blocks under a MiB (`heap.py`) tensors of a run's phases leave holes to each other, which grow over its
# first steps: a base of 135M on rows of 256 tokens takes 417 MiB after 14 steps, 431 after 30, 445 after 120. By this
# share what runs of two bases on rows of up to 512 tokens took in the end is met within 5 %, and not under.
FRAGMENTATION_SHARE = 0.252


def held_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def added_bytes(live: int, asks: bool = False) -> int:
    """What a run with `live` bytes of tensors adds beside them. `asks`: it studies documents."""
    running = RUNNING_BYTES + (STUDY_BYTES if asks else 0)
    return running + MOST_KERNELS * KERNEL_BYTES + round(live * FRAGMENTATION_SHARE)
