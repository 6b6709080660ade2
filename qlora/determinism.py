"""Bit for bit on a GPU: kernels that sum in one order only, for as long as a run lasts.

Flash, memory-efficient and cuDNN attention add up the gradients of keys and values with atomics, in whatever order the
blocks of a grid finish, and so do index_add, index_put and scatter_add. torch has exact forms of them behind
`use_deterministic_algorithms`. In its mode `warn_only=True` attention keeps its atomics and says so
(aten/src/ATen/native/transformers/cuda/attention_backward.cu: "defaults to a non-deterministic algorithm"): the strict
mode alone turns them off, and raises where an operation has no exact form (a float cumsum). So a run is in the mode
that warns, and forward and backward of a step are in the strict one; what has no exact form is said once, and from then
on the run is exact to rounding only.

cuBLAS sums in one order where its workspace is fixed: CUBLAS_WORKSPACE_CONFIG, read when CUDA starts (NVIDIA's cuBLAS
documentation, section on reproducibility).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qlora import device as hardware
from qlora import numerics
from qlora.events import Notice, Sink

if TYPE_CHECKING:
    import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACE = ":4096:8"  # eight buffers of 4,096 KiB; the other value that repeats, ":16:8", may be slower
TO_ROUNDING = "a resumed run equals an uninterrupted one to rounding, not bit for bit"
# What torch raises in its strict mode: at::Context::alertNotDeterministic and alertCuBLASConfigNotDeterministic.
_NO_EXACT_FORM = re.compile(r"([\w.:]{1,80}) does not have a deterministic implementation|(?:it uses (CuBLAS))")

T = TypeVar("T")


def fix_workspace() -> None:
    """Before CUDA starts: what cuBLAS reads then. Whoever has set it decides."""
    os.environ.setdefault(WORKSPACE, FIXED_WORKSPACE)


def promise(device: torch.device) -> str | None:
    """What a resumed run equals where the run under way is not asked to be exact; None where it is, bit for bit."""
    numbers = numerics.of_run()
    if numbers is None or numbers.deterministic is not False:
        return None
    if hardware.is_card(device):
        return TO_ROUNDING
    return "bit for bit: on a CPU train.deterministic = false changes nothing (on a GPU it would be to rounding)"


@contextmanager
def for_run(asked: bool, sink: Sink) -> Iterator[None]:
    """Around a run, before it asks for its device: exact kernels where `asked`; torch's settings are put back after.

    On a CPU nothing is set: its kernels sum in one order by themselves.
    """
    before = os.environ.get(WORKSPACE)
    if not asked:
        yield
        return
    late = before is None and hardware.has_started()
    fix_workspace()
    try:
        with ExitStack() as stack:
            if hardware.is_card(hardware.current()):
                if late:
                    message = f"CUDA was in use before the run and {WORKSPACE} was not set: products may not repeat"
                    sink.emit(Notice("deterministic", f"{message}; set it to {FIXED_WORKSPACE} as the process starts"))
                stack.enter_context(_exact_kernels())
            yield
    finally:
        if before is None:
            os.environ.pop(WORKSPACE, None)


@contextmanager
def _exact_kernels() -> Iterator[None]:
    """torch's mode that warns. For a GPU's runs alone: to set it, and to put it back, imports the whole of inductor."""
    import torch

    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic  # a module that is an object with a property, which mypy does not know
    fills, benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*deterministic", category=UserWarning)
            torch.use_deterministic_algorithms(True, warn_only=True)
            memory.fill_uninitialized_memory = False  # or each `empty` would be filled
            torch.backends.cudnn.benchmark = False
            yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        memory.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = benchmark


def exactly(work: Callable[[], T], undo: Callable[[], None], device: torch.device, sink: Sink) -> T:
    """The result of `work` by exact kernels, where the run is to be exact.

    Where one is missing, `undo` removes what the failed try left, the work is done again by any kernels, and so is all
    that follows in this run; a notice says so.
    """
    import torch

    if not (hardware.is_card(device) and torch.are_deterministic_algorithms_enabled()):
        return work()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return work()
    except RuntimeError as error:
        found = _NO_EXACT_FORM.search(str(error))
        if found is None:
            raise
        missing = found[1] or found[2]
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
    undo()
    torch.use_deterministic_algorithms(False)
    if (numbers := numerics.of_run()) is not None:
        numerics.correct(numbers.model_copy(update={"deterministic": False}))
    sink.emit(Notice("deterministic", f"{missing} has no exact form on this device: {TO_ROUNDING}"))
    return work()
