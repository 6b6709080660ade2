"""A stand-in for a GPU: it answers as `torch.cuda` does and keeps every tensor on the CPU.

    with rehearsal(monkeypatch, Card(total=64 * MIB)) as card: ...

Inside, `qlora.device.is_card` holds of the CPU's tensors, so that a run takes each branch that it would take on a card.
What counts memory there counts it here: an operation's new storages are added when it makes them and taken off when the
last tensor of them is gone, and at the limit `torch.OutOfMemoryError` is raised with the allocator's own words. Host
copies count too (they are in the same memory), so this card is fuller than a real one, never emptier.
Streams and events only count their calls in `card.calls`: on a CPU an operation is done when it returns.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora import device
from qlora.flat import managed
from qlora.model import compiled
from qlora.step.kernels import trial

GIB, MIB = 2**30, 2**20
CONTEXT_BYTES = 4 * MIB  # what the driver keeps for itself


class Event:
    def __init__(self, card: Card, **settings: Any) -> None:
        self.card = card
        self.is_recorded = False

    def record(self, stream: Stream | None = None) -> None:
        self.is_recorded = True
        self.card.calls["Event.record"] += 1

    def wait(self, stream: Stream | None = None) -> None:
        self.card.calls["Event.wait"] += 1

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.card.calls["Event.synchronize"] += 1

    def elapsed_time(self, later: Event) -> float:
        assert self.is_recorded and later.is_recorded, "CUDA raises here: an event that was never recorded"
        return 1.0


class Stream:
    def __init__(self, card: Card, **settings: Any) -> None:
        self.card = card

    def wait_event(self, event: Event) -> None:
        self.card.calls["Stream.wait_event"] += 1

    def wait_stream(self, other: Stream) -> None:
        self.card.calls["Stream.wait_stream"] += 1

    def record_event(self, event: Event | None = None) -> Event:
        made = event or Event(self.card)
        made.record(self)
        return made

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.card.calls["Stream.synchronize"] += 1


class Card(TorchDispatchMode):
    """`torch.cuda`, as far as `qlora.device` asks it: another name is an AttributeError, to be added here.

    `calls` counts what was asked; `live`, `highest` and `total` are bytes.
    """

    def __init__(self, total: int = GIB, name: str = "NVIDIA GeForce RTX 3070", capability: tuple[int, int] = (8, 6)):
        super().__init__()
        self.total, self.name, self.capability = total, name, capability
        self.is_integrated = 0  # 1: its memory is the RAM
        self.has_triton = False  # True: the kernels' twins, which are what a CPU computes, stand in for them
        self.context_bytes: int | None = None  # as `device.measure_context` leaves it
        self.context = CONTEXT_BYTES  # what it really takes
        self.limit = total - CONTEXT_BYTES
        self.live = self.highest = 0
        self.calls: Counter[str] = Counter()
        self.out_of_memory = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._default = Stream(self)
        self._streams = [self._default]

    # --- what device.py needs beside torch.cuda's names ------------------------------------------------------------

    def owns(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def device(self, index: int) -> Any:
        assert index == 0, "there is one card"
        return torch.device("cpu")

    # --- the card -------------------------------------------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return self.name

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self.capability

    def get_device_properties(self, device: Any = None) -> Any:
        return SimpleNamespace(is_integrated=self.is_integrated)

    def get_arch_list(self) -> list[str]:
        return ["sm_{}{}".format(*self.capability)]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return including_emulation or self.capability >= (8, 0)

    # --- memory ---------------------------------------------------------------------------------------------------

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return max(0, self.total - self.context - self.live), self.total

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        assert 0 <= fraction <= 1, "torch.cuda raises ValueError here"
        self.limit = int(fraction * self.total)
        self.calls["set_per_process_memory_fraction"] += 1

    def memory_allocated(self, device: Any = None) -> int:
        return self.live

    def memory_reserved(self, device: Any = None) -> int:
        return self.live

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.highest

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.highest

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.highest = self.live
        self.calls["reset_peak_memory_stats"] += 1

    def empty_cache(self) -> None:
        self.calls["empty_cache"] += 1

    # --- time and order -------------------------------------------------------------------------------------------

    def synchronize(self, device: Any = None) -> None:
        self.calls["synchronize"] += 1

    def Stream(self, *place: Any, **settings: Any) -> Stream:
        return Stream(self)

    def Event(self, **settings: Any) -> Event:
        return Event(self)

    def default_stream(self, device: Any = None) -> Stream:
        return self._default

    def current_stream(self, device: Any = None) -> Stream:
        return self._streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._streams.append(stream)
        try:
            yield
        finally:
            self._streams.pop()

    # --- random numbers: the CPU's generator draws them -----------------------------------------------------------

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    # --- counting -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [value for value in _flat(result) if isinstance(value, Tensor) and value.device.type == "cpu"]
        for value in made:
            self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None and known() is not None:
            return
        nbytes = -(-storage.nbytes() // 512) * 512  # CUDACachingAllocator.cpp, kMinBlockSize
        if self.live + nbytes > self.limit:
            self.out_of_memory += 1
            raise torch.OutOfMemoryError(self._message(nbytes))
        self.live += nbytes
        self.highest = max(self.highest, self.live)
        self._known[storage._cdata] = weakref.ref(storage)
        weakref.finalize(storage, self._free, storage._cdata, nbytes).atexit = False

    def _free(self, key: int, nbytes: int) -> None:
        self.live -= nbytes
        self._known.pop(key, None)

    def _message(self, nbytes: int) -> str:
        """As c10/cuda/CUDACachingAllocator.cpp writes it."""
        free = max(0, self.limit - self.live)
        return (
            f"CUDA out of memory. Tried to allocate {nbytes / MIB:.2f} MiB. GPU 0 has a total capacity of "
            f"{self.total / GIB:.2f} GiB of which {free / MIB:.2f} MiB is free. Of the allocated memory "
            f"{self.live / MIB:.2f} MiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated."
        )


def _flat(result: Any) -> Iterator[Any]:
    if isinstance(result, (tuple, list)):
        for value in result:
            yield from _flat(value)
    else:
        yield result


@contextmanager
def rehearsal(monkeypatch: pytest.MonkeyPatch, card: Card) -> Iterator[Card]:
    """Inside, this process has that card and no other."""
    import bitsandbytes.functional as functional

    def pinned(tensor: Tensor, *place: Any) -> Tensor:
        card.calls["pin_memory"] += 1
        made = tensor.clone()
        made.is_pinned = lambda *_: True  # type: ignore[method-assign]
        return made

    def paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        card.calls["get_paged"] += 1
        made = torch.zeros(*shape, dtype=dtype)
        made.is_paged = True  # type: ignore[attr-defined]
        return made

    def runtime(name: str) -> Any:
        """Functions of CUDA's runtime: the driver can page, and takes its memory back."""

        def called(place: Any, *_: Any) -> int:
            card.calls[name] += 1
            if name == "cudaDeviceGetAttribute":
                place._obj.value = 1
            return 0

        return called

    def prefetch(tensor: Tensor, to_cpu: bool = False) -> None:
        assert tensor.is_paged, "Only paged tensors can be prefetched!"  # type: ignore[attr-defined]
        card.calls["prefetch_tensor"] += 1

    with monkeypatch.context() as patch, card:
        patch.setattr(device, "accelerator", card)
        for asking in (trial, compiled):  # whatever is installed here
            patch.setattr(asking, "find_spec", lambda name: card.has_triton or None)
        patch.setattr(Tensor, "pin_memory", pinned)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: card.calls.update(["record_stream"]))
        patch.setattr(functional, "get_paged", paged)
        patch.setattr(functional, "fill", lambda tensor, value, *_: tensor.fill_(value))
        patch.setattr(managed, "_runtime", runtime)
        patch.setattr(functional, "prefetch_tensor", prefetch)
        yield card
