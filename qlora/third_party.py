"""How other libraries are to behave inside our commands: what they print, and how their threads wait."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from qlora import cores

# The name since torch 2.9, and the two before it.
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
WAITING_THREADS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
ALONE = {"GOMP_SPINCOUNT": "4000"}  # of these, where nobody else computes
# What bitsandbytes (0.50) names its kernels that dequantize on a CPU.
KERNELS_4BIT = tuple(
    f"cdequantize_blockwise_cpu_{codes}_{dtype}" for codes in ("nf4", "fp4") for dtype in ("fp32", "bf16", "fp16")
)


def no_word_to_developers() -> None:
    """For a command: no warnings of names that a library is about to change, which its user cannot act on.

    Whoever asks for warnings (`-W`, PYTHONWARNINGS, TRANSFORMERS_VERBOSITY) gets them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported, here or in a child
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)


def draw_no_bars() -> None:
    """For a command: its own screen draws what is under way; tqdm's bars move the cursor, and quote names of files."""
    os.environ["TQDM_DISABLE"] = "1"  # read when a bar is made, here or in a child


def ask_for_no_widgets() -> None:
    """For a notebook, before transformers is imported: tqdm warns there without ipywidgets, which its bars can do
    without. Whether they are drawn is left as it is: the notebook's own would go with ours."""
    warnings.filterwarnings("ignore", message="IProgress not found")


def let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads sleep soon after their work has run out. Before torch is imported; children inherit it.

    By itself a thread that waits for the others burns its core for milliseconds, also while the one it waits for has
    lost its core to another program: beside two busy processes a step of the quickstart took 9 s in two of three runs,
    0.22 with 1,000 looks, some 50 µs. Where nobody else computes, 4,000 are as fast as libgomp's own 300,000: 0.12 s,
    and 0.17 with 1,000 (tools/bench/README.md). GOMP_SPINCOUNT is libgomp's (torch on Linux),
    KMP_BLOCKTIME libomp's (macOS, Windows), in milliseconds. Whoever has set one of them, or OMP_WAIT_POLICY, decides.
    """
    if not any(name in os.environ for name in (*WAITING_THREADS, "OMP_WAIT_POLICY")):
        os.environ.update(WAITING_THREADS | (ALONE if cores.are_free() else {}))


def let_segments_grow() -> None:
    """Have torch's CUDA allocator map memory where it is needed, so that shapes of every step leave no holes.

    Before torch is imported. Linux alone: Windows' drivers lack the calls, and under WSL they have not been tried.
    Whoever has set the allocator decides (CUDA semantics, "Optimizing memory usage with PYTORCH_ALLOC_CONF").
    """
    if allocator_settings() is None:
        os.environ[ALLOCATORS[0]] = "expandable_segments:True"


def allocator_settings() -> str | None:
    """What the environment tells torch's CUDA allocator; None where it tells nothing."""
    return next((os.environ[name] for name in ALLOCATORS if os.environ.get(name)), None)


@contextmanager
def unprinted_panics() -> Iterator[None]:
    """A native library that gives up prints so by itself, with a stranger's text in it, past every stream of Python's.

    What is written to the process' file descriptor 2 inside the block is lost: a few calls, and no more.
    """
    sys.stderr.flush()
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # the process has no such descriptor
        yield
        return
    try:
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def import_bitsandbytes() -> Any:
    """The library, without its advice on import to install `kernels`, which would fetch native code at run time, and
    with kernels that read 4-bit weights of any width.

    It marks a dozen functions for torch.compile as it is imported, which loads the compiler: a third of what a command
    imports, for functions that few runs call. They are compiled when they are called.
    """
    if (known := sys.modules.get("bitsandbytes")) is not None:
        _read_blocks_on(known)
        return known
    import torch

    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, compile_now = advice.level, torch.compile
    advice.setLevel(logging.ERROR)
    torch.compile = partial(_compile_when_called, compile_now)
    try:
        import bitsandbytes
    finally:
        torch.compile = compile_now
        advice.setLevel(level)
    _read_blocks_on(bitsandbytes)
    return bitsandbytes


def _read_blocks_on(bitsandbytes: Any) -> None:
    """Its kernels that dequantize on a CPU are given blocks as rows (0.50.2, csrc/cpu_ops.cpp).

    A block is of the weight laid out flat, and goes on in the next row. The branch for AVX-512 begins one anew in each
    row: of rows of 48, 80, 96 or 112 it made other numbers, off by half of the largest value. Bytes are bytes to it.
    """
    library = getattr(getattr(bitsandbytes, "cextension", None), "lib", None)
    if KERNELS_4BIT[0] in getattr(library, "__dict__", {}):
        return
    for name in KERNELS_4BIT:
        if kernel := getattr(library, name, None):  # one that does not load has none
            setattr(library, name, partial(_of_whole_blocks, kernel))


def _of_whole_blocks(kernel: Any, codes: Any, constants: Any, out: Any, *sizes: Any) -> None:
    block, rows, width = (int(size.value) for size in sizes)
    if width % block:
        values, kind = rows * width, type(sizes[0])
        rows, width = (values // block, block) if values % block == 0 else (1, values)
        sizes = (sizes[0], kind(rows), kind(width))
    kernel(codes, constants, out, *sizes)


def _compile_when_called(compile_now: Any, function: Any = None, **settings: Any) -> Any:
    """torch.compile as a function or a decorator, whose work is done at the first call."""
    if function is None:
        return partial(_compile_when_called, compile_now, **settings)
    compiled: list[Any] = []

    @wraps(function)
    def call(*values: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(compile_now(function, **settings))
        return compiled[0](*values, **named)

    return call


@contextmanager
def old_names_in_peft() -> Iterator[None]:
    """peft asks transformers for `is_gradient_checkpointing`, whose name is about to change; both still work."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
