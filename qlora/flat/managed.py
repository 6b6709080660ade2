"""Memory that the driver moves between GPU and host as it must (CUDA C++ Programming Guide, unified memory).

bitsandbytes asks for it and starts its moves; it has nothing that gives it back, which CUDA's runtime does
(`cudaFree`), reached through bitsandbytes' library, which is linked against it. Where it is not reached (a static
runtime, Windows), the memory stays until the process ends: one buffer a run.

The GPU writes it behind the host's back: whoever reads or writes it on the host waits for the GPU first.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora import device as hardware
from qlora.third_party import import_bitsandbytes

CONCURRENT_MANAGED_ACCESS = 89  # cudaDevAttrConcurrentManagedAccess (CUDA Runtime API, enum cudaDeviceAttr)
ROOM = 2  # times its size must be free in RAM: a failing cudaMallocManaged ends the process (bitsandbytes' csrc)


class ManagedMemory:
    """`count` bytes, zero at first, until `free`, or until nothing refers to this object any more."""

    def __init__(self, count: int, device: torch.device) -> None:
        functional = import_bitsandbytes().functional
        self.device = device
        paged = functional.get_paged(count, dtype=torch.uint8, device=device)
        functional.fill(paged, 0)  # by a kernel, and waited for
        self.tensor: Tensor = paged
        self._give_back = weakref.finalize(self, _give_back, _runtime("cudaFree"), paged.data_ptr())
        self._give_back.atexit = False  # by then the driver may have left; it takes its memory along

    def prefetch(self) -> None:
        """Ask the driver to bring all of it to the GPU, before what is launched next."""
        import_bitsandbytes().functional.prefetch_tensor(self.tensor)

    def free(self) -> None:
        """Give it back. No view of `tensor` may be used from then on."""
        hardware.synchronize(self.device)
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._give_back()


def why_not(device: torch.device, count: int) -> str:
    """Why the driver cannot manage `count` bytes of a device, and where they are then; "" where it can."""
    if not hardware.is_card(device):
        return "paging needs a CUDA GPU; its state stays in RAM"
    if (concurrent := _is_concurrent(device)) is None:
        return "bitsandbytes' library gives no way to ask the driver whether it can page; its state stays on the GPU"
    if not concurrent:
        return "this system's driver cannot page while the GPU computes (Windows, WSL); its state stays on the GPU"
    if (free := hardware.available_ram()) < ROOM * count:
        needed = f"{ROOM * count / 2**20:.0f} MiB of RAM, of which {free / 2**20:.0f} MiB are free"
        return f"paging needs {needed}; its state stays on the GPU"
    return ""


def _is_concurrent(device: torch.device) -> bool | None:
    """Whether host and GPU may use managed memory at the same time: the attribute that bitsandbytes itself asks.

    None where it cannot be asked: a library with CUDA's runtime inside it does not give its functions away.
    """
    ask, value = _runtime("cudaDeviceGetAttribute"), ctypes.c_int(0)
    of_device = (ctypes.c_int(CONCURRENT_MANAGED_ACCESS), ctypes.c_int(device.index or 0))
    if ask is None or ask(ctypes.byref(value), *of_device):
        return None
    return bool(value.value)


def _runtime(name: str) -> Any:
    """A function of the CUDA runtime that bitsandbytes' library is linked against; None where it is not found."""
    library = getattr(import_bitsandbytes().cextension.lib, "_lib", None)
    return getattr(library, name, None)


def _give_back(cuda_free: Callable[[ctypes.c_void_p], int] | None, address: int) -> None:
    if cuda_free is not None:
        cuda_free(ctypes.c_void_p(address))
