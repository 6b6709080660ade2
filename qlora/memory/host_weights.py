"""Weights on the host, as the estimator counts them: a store that holds nothing and says what one holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.copy_stream import CopyStream
from qlora.events import Sink
from qlora.memory.trace import HOST, LiveBytes
from qlora.model.layer_blobs import LayerWeights
from qlora.model.weight_receiving import tables
from qlora.model.weight_stores import Arriving
from qlora.model.weight_streaming import inside


class _There:
    def arrive(self) -> None:
        pass


class MetaStore:
    """The blobs of a model's layers on meta; what they have is no memory of the device's."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self.host_bytes = 0

    def moved(self, tensor: Tensor) -> Tensor:
        with self._live.region(HOST):
            return torch.empty_like(tensor)

    def put(self, layer: int, weights: LayerWeights) -> None:
        self.host_bytes += weights.layout.nbytes

    def settle(self, sink: Sink) -> None:
        pass

    def send(self, layer: int, slot: Tensor, copies: CopyStream, after: Any) -> Arriving:
        return _There()

    def close(self) -> None:
        pass


def of_model(model: Any) -> int:
    """Bytes of a model's weights on the host: what its store holds, and its embeddings where they are there."""
    streamed = inside(model)
    return (streamed.store.host_bytes if streamed is not None else 0) + sum(table.nbytes for table in tables(model))
