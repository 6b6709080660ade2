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


# Blocks of half a MiB, six at a time, made and freed again and again: page faults of each time after the first.
ENDS = """
import ctypes, resource, sys
from qlora import heap
heap.settle()
if sys.argv[1] == "all":
    ctypes.CDLL(None).mallopt(-1, 1 << 20)
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(5):
    before = faults()
    blocks = [c.malloc(1 << 19) for _ in range(6)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 19)
    for block in reversed(blocks):
        c.free(block)
print(faults() - before)
"""


@on_glibc
def test_the_heaps_end_stays_for_the_next_step() -> None:
    """3 MiB, 768 pages, are not given back at each end of a pass to be asked for again."""

    def again(given_back: str) -> int:
        done = subprocess.run([sys.executable, "-c", ENDS, given_back], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert again("little") < 100 < 400 < again("all")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    assert not heap.give_back_freed_blocks()


@pytest.mark.parametrize("variable", heap.KERNEL_VARIABLES)
def test_the_users_own_bound_of_kernels_counts(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "give_back_freed_blocks", lambda: True)
    for name in heap.KERNEL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    heap.settle()
    assert os.environ[variable] == str(heap.MOST_KERNELS)
    monkeypatch.setenv(variable, "17")
    heap.settle()
    assert os.environ[variable] == "17"


# One product in 400 shapes: what is compiled for one must not be kept for ever.
SHAPES = """
import sys
from qlora import heap
if sys.argv[1] == "settled":
    heap.settle()
import psutil, torch
from torch.nn.functional import linear
weight = torch.randn(576, 192, dtype=torch.bfloat16)
linear(torch.randn(8, 192, dtype=torch.bfloat16), weight)
before = psutil.Process().memory_info().rss
for rows in range(1, 401):
    linear(torch.randn(rows, 192, dtype=torch.bfloat16), weight)
print((psutil.Process().memory_info().rss - before) >> 20, torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""


@on_glibc
def test_kernels_of_many_shapes_are_not_all_kept() -> None:
    """Each of two libraries keeps them: a bound of one of them alone frees none."""

    def kept(how: str) -> int:
        plain = {name: value for name, value in os.environ.items() if name not in heap.KERNEL_VARIABLES}
        command = [sys.executable, "-c", SHAPES, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        grown, compiles = done.stdout.split()
        if compiles != "True":
            pytest.skip("this processor has no compiled products of bf16")
        return int(grown)

    assert kept("settled") < 0.6 * kept("as it is")


# 60 MiB in blocks of half a MiB, all of them freed but one in ten; then the work of another phase begins.
PHASES = """
import ctypes
import psutil
from qlora import heap
heap.settle()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def held():
    return psutil.Process().memory_info().rss >> 20
def work():
    blocks = [c.malloc(1 << 19) for _ in range(120)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 19)
    for number, block in enumerate(blocks):
        if number % 10 != 9:
            c.free(block)
before = held()
work()
after = held()
with heap.another_phase():
    within = held()
    work()
print(after - before, within - before, held() - before)
"""


@on_glibc
def test_a_phase_leaves_no_holes_to_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", PHASES], capture_output=True, text=True, check=True)
    after, within, at_the_end = map(int, done.stdout.split())
    assert after >= 55 and within <= 16 and at_the_end <= 24


def test_holes_stay_where_nobody_can_ask_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with pytest.raises(ZeroDivisionError), heap.another_phase():
        raise ZeroDivisionError
