"""Where the input of a layer that is recomputed waits for the backward pass: on the device, or on the host.

An input leaves a GPU while its layer is computed and comes back while the layer above is gone back through, copied
beside both by a stream of its own; the bytes are the same, so that no number changes. On the host it lies in blocks
that were pinned once and are lent again: the dry run, whose rows are the longest, makes all that a run needs. A block
is as large for rows of one width as for those of another.

The top layer's input is needed at once and stays. What a failed step left behind gives its blocks back as it dies, like
the tensors of its graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora.copy_stream import CopyStream
from qlora.device import host_block, is_card
from qlora.layer_partners import ON_DEVICE, Inputs
from qlora.units import MIB

# Pinned memory is handed out in powers of two (c10's CachingHostAllocator), so that one block for an input of 20 MiB
# would take 32. Blocks of 4 MiB leave less than that unused of an input, and 0.16 ms of a PCIe 4 x16 (25 GB/s) each is
# long beside the 5 µs that it takes to ask for a copy.
BLOCK_BYTES = 4 << 20
SMALLEST_BYTES = 2 << 20  # 0.08 ms of copying: a smaller input is not worth two waits


class Pool:
    """Blocks of host memory, uninitialized; `make` gives another one. What came back last is lent first."""

    def __init__(self, device: torch.device, make: Callable[[], Tensor] | None = None) -> None:
        self.device = device
        self.copies = CopyStream(device)
        self.blocks = self.pageable = 0  # that were made, and of these what could not be pinned
        self.lent = 0
        self._free: list[Tensor] = []
        self._make = make or self._pinned

    @property
    def nbytes(self) -> int:
        return self.blocks * BLOCK_BYTES

    @property
    def said(self) -> str:
        """What a person is told once the longest rows have been run."""
        if not self.blocks:
            least = f"{SMALLEST_BYTES / MIB:.0f} MiB"
            return f"memory.offload_activations: no layer's input takes {least}, all stay on the device"
        message = f"inputs of recomputed layers wait on the host, in {self.nbytes / MIB:,.0f} MiB"
        if not is_card(self.device):
            return f"{message}: without a GPU that is the same memory, and nothing is saved"
        pageable = self.pageable * BLOCK_BYTES / MIB
        return f"{message}; {pageable:,.0f} MiB of them could not be pinned, whose copies wait" if pageable else message

    def lend(self, nbytes: int) -> list[Tensor]:
        """Blocks for so many bytes."""
        count = -(-nbytes // BLOCK_BYTES)
        while len(self._free) < count:
            self._free.append(self._make())
            self.blocks += 1
        self.lent += count
        return [self._free.pop() for _ in range(count)]

    def take_back(self, blocks: list[Tensor]) -> None:
        self.lent -= len(blocks)
        self._free += reversed(blocks)
        blocks.clear()

    def _pinned(self) -> Tensor:
        block = host_block(BLOCK_BYTES // 8, self.device)
        self.pageable += is_card(self.device) and not block.is_pinned()
        return block.view(torch.uint8)


class Flight:
    """What a copy reads or writes on the device, which lives until the computing stream is behind the copy."""

    tensor: Tensor | None = None
    mark: Any = None


class Away:
    """The ticket of an input on the host. `below` is the one that was kept before it and is asked for after it."""

    def __init__(self, hidden_BSD: Tensor, blocks: list[Tensor], below: Away | None) -> None:
        self.shape, self.dtype = hidden_BSD.shape, hidden_BSD.dtype
        self.blocks, self.below = blocks, below
        self.flight = Flight()  # of its way back


class OnHost:
    """Inputs wait in a pool's blocks: those of the first `recomputed` layers of a model that has `layers`."""

    def __init__(self, pool: Pool, recomputed: int, layers: int) -> None:
        self.pool = pool
        self.top, self.last = layers - 1, recomputed - 1
        self._newest: weakref.ref[Away] | None = None  # of those that wait
        self._leaving = Flight()
        self._version = 0

    def keep(self, layer: int, x: Tensor) -> Away | tuple[Tensor, int]:
        """Called before the layer is computed, which the copy runs beside."""
        self._let_go()
        if layer == self.top or x.nbytes < SMALLEST_BYTES or not x.is_contiguous():
            return ON_DEVICE.keep(layer, x.detach())
        below = self._newest() if self._newest is not None else None
        ticket = Away(x, self.pool.lend(x.nbytes), below)
        weakref.finalize(ticket, self._end, ticket.blocks, ticket.flight).atexit = False
        with self.pool.copies.copying():
            for part, block in _pairs(x.detach(), ticket.blocks):
                block.copy_(part, non_blocking=True)
        self._leaving.tensor, self._leaving.mark = x.detach(), self.pool.copies.mark()
        self._version = x._version
        self._newest = weakref.ref(ticket)
        if layer == self.last:  # nobody comes after it to let its input go
            self._let_go()
        return ticket

    def give(self, ticket: Away | tuple[Tensor, int]) -> Tensor:
        self._let_go()
        if isinstance(ticket, tuple):
            if self._newest is not None and (waiting := self._newest()) is not None:
                self._ask_for(waiting)
            return ON_DEVICE.give(ticket)
        self._ask_for(ticket)
        x, below = ticket.flight.tensor, ticket.below
        assert x is not None, "an input is given once"
        self._land(ticket.flight)
        self.pool.take_back(ticket.blocks)
        ticket.below, self._newest = None, None if below is None else weakref.ref(below)
        if below is not None:
            self._ask_for(below)
        return x

    def _ask_for(self, ticket: Away) -> None:
        """Has an input copied to the device, behind what is computed until now: its place there is free by then."""
        if ticket.flight.tensor is not None:
            return
        x = torch.empty(ticket.shape, dtype=ticket.dtype, device=self.pool.device)
        with self.pool.copies.copying():
            for part, block in _pairs(x, ticket.blocks):
                part.copy_(block, non_blocking=True)
        ticket.flight.tensor, ticket.flight.mark = x, self.pool.copies.mark()

    def _let_go(self) -> None:
        """The input that was kept last has left the device before anything else is computed there."""
        if self._leaving.tensor is not None and self._leaving.tensor._version != self._version:
            raise RuntimeError("a layer changed its input in its place: what is kept of it may be either")
        self._land(self._leaving)

    def _land(self, flight: Flight) -> None:
        """What is computed from now on may use the memory that the copy reads or writes."""
        self.pool.copies.wait(flight.mark)
        flight.tensor = flight.mark = None

    def _end(self, blocks: list[Tensor], flight: Flight) -> None:
        """Of a ticket that died, given or not."""
        self._land(flight)
        self.pool.take_back(blocks)


def held_by(pool: Pool, moved: bool | int, layers: int) -> Inputs:
    """Who holds the inputs of recomputed layers: on the host those of the first `moved` of `layers` (True: of all)."""
    count = layers if moved is True else min(moved, layers)
    return OnHost(pool, count, layers) if count else ON_DEVICE


def _pairs(x: Tensor, blocks: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The bytes of an input, cut into blocks, and of each block as many."""
    parts = torch.split(x.view(-1).view(torch.uint8), BLOCK_BYTES)
    return [(part, block[: part.numel()]) for part, block in zip(parts, blocks, strict=True)]


@contextmanager
def kept_by(inputs: Inputs, layer: int, handed: Sequence[Any]) -> Iterator[None]:
    """Inside, what torch's own checkpoint saves of a layer's input, the first thing that it is handed, goes to `inputs`
    and comes back from there."""
    waiting = [x for x in handed[:1] if isinstance(x, Tensor)]

    def pack(saved: Tensor) -> tuple[bool, Any]:
        of_input = [x for x in waiting if x.untyped_storage()._cdata == saved.untyped_storage()._cdata]
        if not of_input or of_input[0].shape != saved.shape:
            return False, saved
        waiting.clear()
        return True, inputs.keep(layer, saved)

    def unpack(packed: tuple[bool, Any]) -> Tensor:
        moved, value = packed
        return inputs.give(value) if moved else value  # type: ignore[no-any-return]

    with saved_tensors_hooks(pack, unpack):
        yield
