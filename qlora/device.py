"""The device that computes: every call of `torch.cuda`, every stream, event and pinned buffer (a test holds it).

Functions take the device that they ask about and answer for a CPU as well, so that callers need no case of their own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Card:
    """A CUDA GPU as its driver describes it. `capability` is the compute capability, such as (8, 9)."""

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
    return Card(torch.cuda.get_device_name(), free, total, torch.cuda.get_device_capability())


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


def with_own_random_state(device: torch.device) -> list[torch.device]:
    """For `torch.random.fork_rng(devices=...)`: the CPU's state is always kept, a GPU's when it is named."""
    return [device] if device.type == "cuda" else []


def host_block(words: int, device: torch.device) -> torch.Tensor:
    """So many int64 values on the host, uninitialized; pinned, so that a copy to a GPU `device` waits for nothing.

    Pageable where the system pins no more (WSL gives little): then the copy waits, and is right.
    """
    import torch

    if device.type == "cuda":
        with suppress(RuntimeError):
            return torch.empty(words, dtype=torch.int64, pin_memory=True)
    return torch.empty(words, dtype=torch.int64)
