"""How much memory the process has used at most."""

from __future__ import annotations

import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """On a GPU the allocator's peak of live tensors; without one the process's peak of resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0  # resource is a POSIX module; the CPU path on Windows has no figure
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
