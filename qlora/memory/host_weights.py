"""Weights on the host, as the estimator counts them: a store that holds nothing and says what one holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.copy_stream import CopyStream
from qlora.events import Sink
from qlora.gathering import part_bytes
from qlora.memory.trace import HOST, LiveBytes
from qlora.model import head_streaming
from qlora.model.base_cache.layers_on_disk import RAM_SHARE
from qlora.model.layer_blobs import LayerWeights
from qlora.model.weight_receiving import tables
from qlora.model.weight_stores import Arriving
from qlora.model.weight_streaming import inside
from qlora.recipe.reading import Recipe


class _There:
    def arrive(self) -> None:
        pass


class MetaStore:
    """The blobs of a model's layers on meta. Beside a GPU they are no memory of the device's; without one they are.

    Of layers that `shards` processes share, the device has this one's part.
    """

    def __init__(self, live: LiveBytes, shards: int = 1) -> None:
        self._live, self._shards = live, shards
        self._beside_card = live.target == "cuda"
        self._blobs: list[Tensor] = []
        self.host_bytes = self.shared_bytes = 0

    def moved(self, tensor: Tensor) -> Tensor:
        if not self._beside_card:
            return tensor
        with self._live.region(HOST):
            return torch.empty_like(tensor)

    def put(self, layer: int, weights: LayerWeights) -> None:
        nbytes = weights.layout.nbytes
        if self._shards > 1:
            self.shared_bytes += nbytes
        else:
            self.host_bytes += nbytes
        if self._shards > 1 or not self._beside_card:
            with self._live.region("weights"):
                part = part_bytes(nbytes, self._shards)
                self._blobs.append(torch.empty(part, dtype=torch.uint8, device="meta"))

    def settle(self, sink: Sink) -> None:
        pass

    def send(self, layer: int, slot: Tensor, copies: CopyStream, after: Any) -> Arriving:
        return _There()

    def close(self) -> None:
        pass


def from_disk(weights: int, free: int | None, recipe: Recipe) -> int:
    """Of the bytes of streamed layers, what a run reads from files in each pass: all, where RAM is too short for them
    and the base may be kept (`model/base_cache/layers_on_disk.py`). `free`: None where no machine is asked about."""
    may = recipe.memory.cache is not False and recipe.quantization.type != "none"
    return weights if may and free is not None and weights > RAM_SHARE * free else 0


def of_model(model: Any) -> int:
    """Bytes of a model's weights on the host: what its store holds, and its embeddings where they are there."""
    streamed = inside(model)
    return (streamed.store.host_bytes if streamed is not None else 0) + of_tables(model)


def of_tables(model: Any) -> int:
    """Of them, those of embeddings and head."""
    return sum(table.nbytes for table in tables(model))


def of_head(model: Any) -> int:
    """Of them, those of a head that comes in blocks."""
    sender = head_streaming.inside(model)
    return 0 if sender is None else sender.host_bytes
