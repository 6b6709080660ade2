"""Without a GPU, memory that a step no longer needs goes back to the system, and compiled kernels have a bound."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from qlora import heap

# Blocks of 8 MiB, of which one in two stays: a heap with holes keeps them all.
HOLES = """
import ctypes, sys
import psutil
from qlora import heap
if sys.argv[1] == "settled":
    heap.settle()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
SIZE = 8 << 20
c.free(c.malloc(2 * SIZE))  # from now on glibc would take blocks of this size from its heap
before = psutil.Process().memory_info().rss
blocks = [c.malloc(SIZE) for _ in range(20)]
for block in blocks:
    ctypes.memset(block, 1, SIZE)
for block in blocks[::2]:
    c.free(block)
print((psutil.Process().memory_info().rss - before) // SIZE)
"""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")


@on_glibc
def test_a_block_that_is_freed_between_others_goes_back() -> None:
    def kept(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kept("settled") <= 11 and kept("as it is") >= 18


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    assert not heap.give_back_freed_blocks()


def test_the_users_own_bound_of_kernels_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "give_back_freed_blocks", lambda: True)
    monkeypatch.delenv(heap.KERNELS_VARIABLE, raising=False)
    heap.settle()
    assert os.environ[heap.KERNELS_VARIABLE] == str(heap.MOST_KERNELS)
    monkeypatch.setenv(heap.KERNELS_VARIABLE, "17")
    heap.settle()
    assert os.environ[heap.KERNELS_VARIABLE] == "17"
