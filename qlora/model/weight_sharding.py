"""The third holder of a model's frozen layers, for a base that no card of a run holds: each process keeps 1/N of every
layer, and gathers a layer for the time it is computed.

A layer's blob (`layer_blobs.py`) is cut into N equal parts on the processes' own devices. Each process reads a layer's
tensors, quantizes them, keeps its part and lets go of the rest; none of them ever has more of the base than one layer
and its parts. For computing, a layer comes by an all-gather of bytes into one of the two places that streamed layers
take in turn (`weight_streaming.py`), asked for while the layer before it is computed, forth and back the same way. The
bytes are the ones that a resident model has, so that no number changes. Embeddings, head, norms and tables are each
process's own (head and embeddings on the host with memory.embedding = "host").

Who gathers when is `qlora/gathering.py`'s. The two places are made with the base and kept: a process whose memory has
run out still takes part in what the others gather, and needs nothing more for that.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from qlora.copy_stream import CopyStream
from qlora.events import Notice, Sink
from qlora.gathering import Gathers, part_bytes
from qlora.model.layer_blobs import LayerWeights
from qlora.model.weight_stores import Arriving
from qlora.model.weight_streaming import Ring
from qlora.units import gib


class _Coming:
    def __init__(self, copies: CopyStream, mark: Future[Any]) -> None:
        self._copies, self._mark = copies, mark

    def arrive(self) -> None:
        self._copies.wait(self._mark.result())


class ShardStore:
    """This process's parts of all layers (`weight_receiving.Keeper`, `gathering.Holder`); `put` each of them once."""

    host_bytes = 0

    def __init__(self, layers: int, device: torch.device, gathers: Gathers) -> None:
        self.device, self.gathers = device, gathers
        self._parts: list[Tensor | None] = [None] * layers
        self._ring: Ring | None = None

    @property
    def device_bytes(self) -> int:
        """What the parts take."""
        return sum(part.nbytes for part in self._parts if part is not None)

    def moved(self, tensor: Tensor) -> Tensor:
        return tensor.cpu()

    def put(self, layer: int, weights: LayerWeights) -> None:
        blob, place = weights.pack(), self.gathers.place
        nbytes = part_bytes(len(blob), place.size)
        mine = blob[place.rank * nbytes : (place.rank + 1) * nbytes]
        part = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        part[: len(mine)] = mine
        self._parts[layer] = part

    def settle(self, sink: Sink) -> None:
        size, held = self.gathers.place.size, gib(self.device_bytes)
        message = f"weights are shared: each of {size} processes keeps 1/{size} of every layer, {held} here"
        sink.emit(Notice("memory", f"{message}, and gathers a layer while it is computed", size))

    def serve(self, ring: Ring) -> None:
        """From now on others may gather, and what they want comes to the places of `ring`, which stay."""
        ring.prepare()
        ring.stays = True
        self._ring, self.gathers.holder = ring, self

    # --- as a store

    def send(self, layer: int, slot: Tensor, copies: CopyStream, after: Any) -> Arriving:
        return _Coming(copies, self.gathers.want(layer, slot, copies, after))

    def close(self) -> None:
        if self.gathers.holder is self:
            self.gathers.holder = None
        self._parts, self._ring = [None] * len(self._parts), None

    # --- as a holder of parts

    def part(self, number: int) -> Tensor:
        part = self._parts[number]
        assert part is not None, f"layer {number} has no part here"
        return part

    def forget(self) -> None:
        assert self._ring is not None
        self._ring.forget()

    def room(self) -> tuple[Tensor, CopyStream]:
        assert self._ring is not None
        self._ring.forget()
        return self._ring.slots[0].blob, self._ring.copies
