"""The next step's micro-batches are made while this one runs, each in one block of memory that is copied at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.device import host_block

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Ahead(Generic[K, V]):
    """`make(key)`, asked for in advance: one thread makes it meanwhile, and ends with the `with` block.

    What `make` raises is raised where the result is taken, and nowhere when it is not.
    """

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[K, Future[V]] | None = None

    def __enter__(self) -> Ahead[K, V]:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qlora-ahead")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._next = None

    def prepare(self, key: K) -> None:
        """Have `make(key)` begin in the thread, if there is one."""
        if self._thread is not None:
            self._next = key, self._thread.submit(self._make, key)

    def take(self, key: K) -> V:
        """`make(key)`: what was prepared where it is that, else made now."""
        prepared, self._next = self._next, None
        return prepared[1].result() if prepared is not None and prepared[0] == key else self._make(key)


@dataclass(frozen=True)
class BlockBatch(Batch):
    """A micro-batch whose tensors are views of `block`, int64 and from its first value on: one copy moves all."""

    block: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        assert self.block is not None
        moved = self.block.to(device, non_blocking=True).view(torch.uint8)
        values: dict[str, Any] = {field.name: _same_view(getattr(self, field.name), moved) for field in fields(Batch)}
        return Batch(**{**values, "host_ids_BS": self.input_ids_BS})


def in_one_block(batch: Batch, device: torch.device) -> BlockBatch:
    """A copy of a micro-batch on the host, ready to be moved to `device`: pinned where that is a GPU."""
    values = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    words = {name: -(-tensor.nbytes // 8) for name, tensor in tensors.items()}
    block, start = host_block(sum(words.values()), device), 0
    for name, tensor in tensors.items():
        part = block[start : start + words[name]].view(torch.uint8)[: tensor.nbytes]
        values[name] = part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += words[name]
    return BlockBatch(**values, block=block)


def _same_view(value: object, block: Tensor) -> object:
    """The tensor at the place in `block`, bytes, that `value` has in its own; what is no tensor is itself."""
    if not isinstance(value, Tensor):
        return value
    start = value.storage_offset() * value.element_size()
    return block[start : start + value.nbytes].view(value.dtype).view(value.shape)
