"""The C library's heap of a process that trains without a GPU: what tensors no longer need goes back to the system.

glibc raises the size from which a block is mapped on its own to that of the largest one freed so far (up to 32 MiB,
mallopt(3)): after a few steps all of a step's tensors lie in one heap, whose holes stay resident when rows are of
different lengths. 135M parameters, rows of up to 256 tokens: 731 MiB beside what was held before, 628 with the size
fixed; 5 % more processor time, for pages that are mapped anew.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# malloc.h: what mallopt sets.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
OWN_MAPPING_BYTES = 1 << 20
# What the heap keeps at its end. With one MiB its end moved to and fro within each step: 1 x 400 tokens of the
# quickstart's base took 10,200 page faults a step, 4,800 with 8 MiB (and 10 where no block is mapped on its own), and a
# tenth more time, at the same peak.
KEPT_BYTES = 8 << 20
# A kernel is compiled for each shape of a product, 0.4 to 0.65 MiB of code and plans, and kept twice: by oneDNN (1,024
# by itself) and by torch's layer above it (ideep's LRU_CACHE_CAPACITY, 1,024 as well), which alone keeps all of them
# from being freed: 600 shapes of one layer took 388 MiB, 245 with the first bounded, 16 with both at 16. A step of rows
# of one width has more than 32 shapes: a bound that it goes round makes every product anew (1 x 400 tokens of the
# quickstart's base: 1,188 to 1,285 tokens/s with 32, 2,185 with 64, 1,590 to 2,143 with 128). Rows of many widths mind
# none of them: 60 steps of the quickstart take 22 s of processor time each way, and 626, 655 and 701 MiB.
KERNEL_VARIABLES, MOST_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 64


def settle() -> None:
    """For a process that is about to train without a GPU: what it takes beside its tensors has an end, and is known."""
    for variable in KERNEL_VARIABLES:  # read when the first kernel is compiled
        os.environ.setdefault(variable, str(MOST_KERNELS))
    give_back_freed_blocks()


def give_back_freed_blocks() -> bool:
    """From now on blocks of a MiB and more are mapped on their own, and all threads share one heap for the others.

    Whether it could be arranged: only glibc has these settings; a process that trains has no other use of its heap.
    """
    settings = ((_M_MMAP_THRESHOLD, OWN_MAPPING_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_ARENA_MAX, 1))
    with suppress(OSError, AttributeError):  # no such library, no such function: another C library under that name
        if (library := _glibc()) is not None:
            arranged = [library.mallopt(name, value) == 1 for name, value in settings]  # whatever the first answers
            return all(arranged)
    return False


@contextmanager
def another_phase() -> Iterator[None]:
    """Work whose blocks have other sizes than those before it and after it: holes between blocks go back to the system.

    Beside the holes that steps on rows of 384 tokens had left, 231 MiB of a base of 135M, the logits of an evaluation
    took 60 MiB more than a step does.
    """
    give_back_holes()
    try:
        yield
    finally:
        give_back_holes()


def give_back_holes() -> None:
    """Whatever lies free between blocks of the heap; where that cannot be asked for, it stays."""
    with suppress(OSError, AttributeError):
        if (library := _glibc()) is not None:
            library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
