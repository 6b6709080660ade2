"""What each process of a run computes with, as it told the others when they joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated

from pydantic import Field

from qlora.foreign_json import ForeignModel

_Bytes = Annotated[int, Field(ge=0, le=2**53)]


class Rank(ForeignModel):
    """A process's card, or its processor: `name` as the driver calls it; `free_bytes` it may use, with what its own
    context takes, and without what the exchange has taken already; `host_bytes` of RAM for what waits there."""

    name: Annotated[str, Field(max_length=200)]
    on_card: bool
    total_bytes: _Bytes
    free_bytes: _Bytes
    capability: Annotated[int, Field(ge=0, le=9999)] = 0  # CUDA's compute capability, 86 for 8.6
    host_bytes: _Bytes | None = None

    @property
    def kind(self) -> tuple[str, int, int]:
        """What is alike in processes that compute alike."""
        return self.name, self.total_bytes, self.capability


_OF_RUN: ContextVar[tuple[Rank, ...]] = ContextVar("qlora_ranks", default=())


def of_run() -> tuple[Rank, ...]:
    """Those of the run that is under way, by their numbers; none where this process is the only one."""
    return _OF_RUN.get()


@contextmanager
def told(ranks: Sequence[Rank]) -> Iterator[None]:
    """Inside the block `of_run` answers with `ranks`."""
    token = _OF_RUN.set(tuple(ranks))
    try:
        yield
    finally:
        _OF_RUN.reset(token)
