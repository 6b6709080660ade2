"""The device that computes: every call of `torch.cuda`, every stream, event and pinned buffer (a test holds it).

Functions take the device that they ask about and answer for a CPU as well, so that callers need no case of their own.
Who does need one asks `is_card`, never a device's type: tests rehearse the whole CUDA path on a stand-in for the card
whose tensors stay on the CPU, and what asks a type would not take part.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import heap, shown
from qlora.wsl import is_wsl

if TYPE_CHECKING:
    import torch


class Cuda:
    """`torch.cuda` by its own names, and which tensors are its own. The one object that a stand-in replaces.

    `context_bytes` is what this process's context took of the card by its first kernel; None where nobody measured it.
    """

    context_bytes: int | None = None

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch.cuda, name)

    def owns(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def device(self, index: int) -> torch.device:
        import torch

        return torch.device("cuda", index)


accelerator: Any = Cuda()


# Compute capability from which bitsandbytes has kernels for 4 bit (its installation guide, 0.50): GTX 10, P100.
OLDEST = (6, 0)
FINDS_NONE = "it finds none"  # what `trouble` says where torch says nothing itself
# More than this in a context is no context: some other program took it meanwhile (150 to 500 MiB are known).
MOST_CONTEXT_BYTES = 1 << 30
# Of a card's free memory, left alone where the driver spills: the desktop takes more and less of it while a run lasts.
SPILL_SHARE = 0.05
SPILL_MARGIN_BYTES = 300 << 20
_REDUCED_SUMS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@dataclass(frozen=True)
class Card:
    """A GPU as its driver describes it. `capability` is CUDA's compute capability, such as (8, 9); AMD's have (0, 0).

    `free_bytes` is what may be taken: less than the driver calls free where it would spill rather than fail.
    """

    name: str
    free_bytes: int
    total_bytes: int
    capability: tuple[int, int]


def is_card(device: torch.device) -> bool:
    """Whether what lies there lies in a GPU's memory."""
    return bool(accelerator.owns(device))


def current() -> torch.device:
    """Where this process computes: the GPU that torch has chosen, or the CPU."""
    import torch

    if accelerator.is_available():
        return accelerator.device(accelerator.current_device())  # type: ignore[no-any-return]
    return torch.device("cpu")


def name_of(device: torch.device) -> str:
    if is_card(device):
        return str(accelerator.get_device_name(device))
    return device.type


def computes_bf16(device: torch.device) -> bool:
    """Whether it has bf16 arithmetic: GPUs have since Ampere (compute capability 8.0), CPUs compute it somehow."""
    return not is_card(device) or bool(accelerator.is_bf16_supported(including_emulation=False))


def trains(device: torch.device) -> bool:
    """Whether layers can compute there in 16 bits: in bf16, or in fp16 where 4 bit has kernels."""
    return computes_bf16(device) or capability(device) >= OLDEST


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, such as (8, 9). AMD's have none: they answer (0, 0).

    torch gives the number of their own architecture there, (11, 0) for gfx1100, which reads as a newer card than any.
    """
    import torch

    if torch.version.hip is not None:
        return 0, 0
    major, minor = accelerator.get_device_capability(device)
    return major, minor


def has_started() -> bool:
    """Whether this process uses the GPU already: what CUDA's libraries read from the environment, they have read."""
    return bool(accelerator.is_initialized())


def card() -> Card | None:
    """The GPU that a run would use; None where there is none, or one that is too old to train."""
    if not (accelerator.is_available() and trains(current())):
        return None
    free, total = _memory(current())
    return Card(accelerator.get_device_name(), usable(free), total, capability(current()))


def facts() -> tuple[str, tuple[int, int], list[str]] | None:
    """Name and compute capability of the GPU, and the architectures that torch has kernels for; None without a GPU.

    AMD's cards have no compute capability: None as well.
    """
    import torch

    if torch.version.hip is not None or trouble_in_sight():
        return None
    with warnings.catch_warnings(), suppress(RuntimeError):  # `trouble` says what it is
        warnings.simplefilter("ignore")  # torch's own word on an architecture that it lacks
        return accelerator.get_device_name(), accelerator.get_device_capability(), accelerator.get_arch_list()
    return None


def trouble_in_sight() -> str:
    """Why torch finds no GPU, in its own words; "" where it finds one."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if accelerator.is_available():
            return ""
    words = (str(one.message).partition(" (Triggered internally")[0] for one in said)
    return "; ".join(words) or FINDS_NONE


def trouble() -> str | None:
    """Why the GPU does not compute, in the words of torch and CUDA; None where it has added two numbers."""
    import torch

    if said := trouble_in_sight():
        return shown.one_line(said)[:300]
    try:
        torch.ones(1, device=current()).add_(1)
        accelerator.synchronize()
    except RuntimeError as error:  # torch's and CUDA's errors are
        return shown.one_line(str(error).partition("\n")[0])[:300]
    return None


def has_xpu() -> bool:
    """Whether torch finds a GPU of Intel's."""
    import torch

    return bool(torch.xpu.is_available())


def available_ram() -> int:
    """Bytes that a new process can have: what the system says, or less where a control group sets a limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(0, int(most) - used)) if most.isdigit() else free


def free_bytes(device: torch.device) -> int:
    """What the device has left for tensors, or the RAM that a process can have."""
    if is_card(device):
        return _memory(device)[0]
    return available_ram()


def _memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a card.

    One of NVIDIA's that shares the RAM (GB10, Jetson) calls taken what the system keeps of files in its page cache, and
    gives back as soon as somebody needs it: what the system calls available is free there. AMD's keep a part of the RAM
    for themselves.
    """
    import torch

    free, total = accelerator.mem_get_info(device)
    if torch.version.hip is None and accelerator.get_device_properties(device).is_integrated:
        free = max(free, min(available_ram(), total))
    return int(free), int(total)


def peak_bytes(device: torch.device) -> int | None:
    """The allocator's peak of live tensors; None where the device has no allocator that counts."""
    if is_card(device):
        return int(accelerator.max_memory_allocated(device))
    return None


def live_bytes(device: torch.device) -> int | None:
    """Bytes of the allocator's live tensors now; None where the device has no allocator that counts."""
    if is_card(device):
        return int(accelerator.memory_allocated(device))
    return None


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more: cycles first, then the allocator's empty blocks."""
    import gc

    gc.collect()
    if is_card(device):
        accelerator.empty_cache()
    else:
        heap.give_back_holes()


def release(device: torch.device) -> None:
    """After a run, and before another model is loaded: nothing is held, and the peak is counted from here."""
    release_memory(device)
    if is_card(device):
        accelerator.reset_peak_memory_stats(device)


def may_spill() -> bool:
    """Whether the driver moves to RAM what a card has no room for, and says nothing: Windows' display drivers do.

    Under WSL too, where the driver's own switch against it has no effect (microsoft/WSL#11050).
    """
    return sys.platform == "win32" or is_wsl()


def usable(free: int) -> int:
    """Of what the driver calls free: not the last of it where the driver would spill."""
    return int(free * (1 - SPILL_SHARE)) if may_spill() else free


def is_full(device: torch.device) -> bool:
    """Whether so little is free that a driver which may spill does so."""
    return free_bytes(device) < SPILL_MARGIN_BYTES


def beyond_allocator(device: torch.device) -> int:
    """Bytes of a card that are gone and that torch's allocator has not: contexts, and what other programs hold."""
    if not is_card(device):
        return 0
    free, total = _memory(device)
    return max(0, total - free - int(accelerator.memory_reserved(device)))


def measure_context(free_before: int) -> None:
    """What this process's context takes, right after its first kernel.

    `free_before` is what the driver called free before there was a context: asking CUDA for it would make one. What
    cannot be a context's size is not believed.
    """
    device = current()
    if is_card(device):
        taken = beyond_allocator(device) - (_memory(device)[1] - free_before)
        accelerator.context_bytes = taken if 0 < taken <= MOST_CONTEXT_BYTES else None


def measured_context() -> int | None:
    """What `measure_context` has found in this process."""
    return accelerator.context_bytes  # type: ignore[no-any-return]


def context_taken(device: torch.device, expected: int) -> int:
    """What this process's context holds of the device now: as measured by its first kernel, where somebody did.

    Else `expected` bytes, or all that is gone where that is less: before the first kernel it is smaller than it will
    be, and what other programs hold cannot be told from it.
    """
    if (measured := measured_context()) is not None and is_card(device):
        return measured
    return min(expected, beyond_allocator(device))


def limit_memory(device: torch.device, limit_bytes: int | None, context_bytes: int) -> None:
    """Have torch's allocator raise its OutOfMemoryError at a limit of the whole process, or of what is free now.

    The context, which no allocator counts, is taken as `context_bytes`, as it will be after a step, or as what the card
    holds where that is less, and as what was measured where that is more. Never more may be taken than is usable of
    what is free now. A CPU has no limit.
    """
    if is_card(device):
        free, total = _memory(device)
        ours = accelerator.memory_reserved(device)
        most = usable(free) + ours
        if limit_bytes is not None:
            foreseen = min(context_bytes, beyond_allocator(device))
            most = min(most, limit_bytes - max(foreseen, measured_context() or 0))
        accelerator.set_per_process_memory_fraction(min(1.0, max(0, most) / total), device)


def lift_limit(device: torch.device) -> None:
    """Take back what `limit_memory` has set."""
    if is_card(device):
        accelerator.set_per_process_memory_fraction(1.0, device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for; a CPU has."""
    if is_card(device):
        accelerator.synchronize(device)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, on the host or on `device`, is as if it had not been drawn."""
    import torch

    with torch.random.fork_rng(devices=[]):
        if not is_card(device):
            yield
            return
        state = accelerator.get_rng_state(device)
        try:
            yield
        finally:
            accelerator.set_rng_state(state, device)


@contextmanager
def full_sums(device: torch.device) -> Iterator[None]:
    """Inside, the parts of a long sum are added in fp32 on a card; torch's settings are put back.

    By default cuBLAS may split a product along the summed dimension and add the parts in the inputs' 16 bits (CUDA
    semantics in torch's notes, "Reduced Precision Reduction"): the gradients of a low-rank adapter, sums over all
    tokens for few columns, are what it splits.
    """
    import torch

    settings: Any = torch.backends.cuda.matmul
    before = {name: getattr(settings, name) for name in _REDUCED_SUMS} if is_card(device) else {}
    # Beside it newer versions of torch have whether a sum may be split at all, which stays as it is.
    split = {name: getattr(settings, f"{name}_split_k", None) for name in before}

    def put(name: str, reduced: bool) -> None:
        setattr(settings, name, reduced if split[name] is None else (reduced, split[name]))

    for name in before:
        put(name, False)
    try:
        yield
    finally:
        for name, reduced in before.items():
            put(name, reduced)


@contextmanager
def on_default_stream(device: torch.device) -> Iterator[None]:
    """For bitsandbytes, whose kernels take no stream and run on the default one: after what the current stream was
    asked to do before, and before what it is asked to do next. Nothing happens where the two are one.
    """
    if not is_card(device) or accelerator.current_stream(device) == accelerator.default_stream(device):
        yield
        return
    current, default = accelerator.current_stream(device), accelerator.default_stream(device)
    default.wait_stream(current)
    with accelerator.stream(default):
        yield
    current.wait_stream(default)


def host_block(words: int, device: torch.device) -> torch.Tensor:
    """So many int64 values on the host, uninitialized; pinned, so that a copy to a GPU `device` waits for nothing.

    Pageable where the system pins no more (WSL gives little): then the copy waits, and is right.
    """
    import torch

    return pinned(torch.empty(words, dtype=torch.int64), device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host that nothing changes, whole when this returns; pinned where it comes from a GPU."""
    import torch

    if not is_card(tensor.device):
        return tensor.detach().to("cpu", copy=True)
    block = pinned(torch.empty(tensor.shape, dtype=tensor.dtype), tensor.device)
    return block.copy_(tensor.detach())


def pinned(block: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The block in memory that the system leaves in its place, where a GPU `device` copies from or to it."""
    if is_card(device):
        with suppress(RuntimeError):
            return block.pin_memory()
    return block
