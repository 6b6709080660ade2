"""Which micro-batch a forward pass is of, for whoever makes its masks: the device is not asked what the host knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qlora.batch import Batch

_IN_FORWARD: ContextVar[Batch | None] = ContextVar("micro-batch of the forward pass", default=None)


@contextmanager
def in_forward(batch: Batch) -> Iterator[None]:
    """While a trunk computes `batch`, `of_forward` gives it, if it knows its documents."""
    token = _IN_FORWARD.set(batch if batch.cu_seqlens is not None else None)
    try:
        yield
    finally:
        _IN_FORWARD.reset(token)


def host_ids(input_ids: Any) -> Any:
    """Ids on the host where they are those of the micro-batch of this forward pass, which began there; else they are
    read back, for which the host waits (an answer's tokens are made on the device)."""
    batch = _IN_FORWARD.get()
    known = batch is not None and input_ids is batch.input_ids_BS and batch.host_ids_BS is not None
    return batch.host_ids_BS if batch is not None and known else input_ids.cpu()


def of_forward(position_ids: Any = None) -> Batch | None:
    """The micro-batch whose forward pass this thread is in; None where it is in none, or `position_ids` is another's.

    A backward pass that computes layers anew is in none (on a GPU it is even in another thread): what a layer needs
    must be handed to it.
    """
    batch = _IN_FORWARD.get()
    return (
        None if batch is not None and position_ids is not None and position_ids is not batch.position_ids_BS else batch
    )
