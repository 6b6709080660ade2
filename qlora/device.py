"""The device that computes: every call of `torch.cuda`, every stream, event and pinned buffer (a test holds it).

Functions take the device that they ask about and answer for a CPU as well, so that callers need no case of their own.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Of a card's free memory, left alone where the driver spills: the desktop takes more and less of it while a run lasts.
SPILL_SHARE = 0.05
SPILL_MARGIN_BYTES = 300 << 20


@dataclass(frozen=True)
class Card:
    """A CUDA GPU as its driver describes it. `capability` is the compute capability, such as (8, 9).

    `free_bytes` is what may be taken: less than the driver calls free where it would spill rather than fail.
    """

    name: str
    free_bytes: int
    total_bytes: int
    capability: tuple[int, int]


def current() -> torch.device:
    """Where this process computes: its GPU, or the CPU."""
    import torch
    from accelerate import PartialState

    device = PartialState().device
    return device if device.type in ("cuda", "xpu") else torch.device("cpu")


def name_of(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def computes_bf16(device: torch.device) -> bool:
    """Whether it has bf16 arithmetic: GPUs have since Ampere (compute capability 8.0), CPUs compute it somehow."""
    import torch

    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def card() -> Card | None:
    """The GPU that a run would use; None where there is none, or none with bf16."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)):
        return None
    free, total = torch.cuda.mem_get_info()
    return Card(torch.cuda.get_device_name(), usable(free), total, torch.cuda.get_device_capability())


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
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_ram()


def peak_bytes(device: torch.device) -> int | None:
    """The allocator's peak of live tensors; None where the device has no allocator that counts."""
    import torch

    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more: cycles first, then the allocator's empty blocks."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def release(device: torch.device) -> None:
    """After a run, and before another model is loaded: nothing is held, and the peak is counted from here."""
    import torch

    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def may_spill() -> bool:
    """Whether the driver moves to RAM what a card has no room for, and says nothing: Windows' display drivers do.

    Under WSL too, where the driver's own switch against it has no effect (microsoft/WSL#11050).
    """
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def is_full(device: torch.device) -> bool:
    """Whether the card is so full that a driver which may spill does so: less than SPILL_MARGIN is free."""
    return device.type == "cuda" and free_bytes(device) < SPILL_MARGIN_BYTES


def limit_memory(device: torch.device, limit_bytes: int | None, context_bytes: int) -> None:
    """Have torch's allocator raise its OutOfMemoryError at a limit of the whole process, or of what is free now.

    The context, which no allocator counts, is taken as `context_bytes`, or as what the card holds where that is less.
    Without `limit_bytes` all that is free may be used, less a share where the driver would spill. A CPU has no limit.
    """
    import torch

    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    taken = min(context_bytes, max(0, total - free - ours))
    most = usable(free) + ours if limit_bytes is None else limit_bytes - taken
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, most) / total), device)


def usable(free: int) -> int:
    """Of what the driver calls free: on systems that spill, not the last of it."""
    return int(free * (1 - SPILL_SHARE)) if may_spill() else free


def with_own_random_state(device: torch.device) -> list[torch.device]:
    """For `torch.random.fork_rng(devices=...)`: the CPU's state is always kept, a GPU's when it is named."""
    return [device] if device.type == "cuda" else []
