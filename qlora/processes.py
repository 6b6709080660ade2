"""Processes that a launcher has started as parts of one run: who this one is, and who refuses to be one of several.

torchrun and `accelerate launch` say it in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, and where the first
process listens in MASTER_ADDR and MASTER_PORT (torch's documentation of `torch.distributed`, environment variable
initialization). Training divides its steps among them (`training/processes.py`); whatever else we do is one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from qlora.errors import HardwareError

# How launchers tell a process how many there are: torchrun and accelerate, Open MPI, MPICH and Intel MPI, MVAPICH2.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
HINT = "start it without torchrun, accelerate launch or mpirun"


@dataclass(frozen=True)
class Place:
    """Of `size` processes the one of number `rank`; of `local_size` on this machine the one of number `local_rank`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"


ALONE = Place()
_OF_RUN: ContextVar[Place] = ContextVar("qlora_place", default=ALONE)


def of_run() -> Place:
    """This process's place in the run that is under way; ALONE outside of one."""
    return _OF_RUN.get()


@contextmanager
def taken(place: Place) -> Iterator[None]:
    """Inside the block the work is one of several processes', and `of_run` answers with `place`."""
    token = _OF_RUN.set(place)
    try:
        yield
    finally:
        _OF_RUN.reset(token)


def launched() -> Place:
    """What torchrun or `accelerate launch` says of this process; ALONE where none has started it, or it is the only
    one. Raises HardwareError for several processes of a launcher that says less."""
    size = _number("WORLD_SIZE")
    if size is None or size < 2:
        refuse_several()  # another launcher's
        return ALONE
    rank = _number("RANK")
    if rank is None or rank >= size or any(not os.environ.get(name) for name in NEEDED):
        what = f"WORLD_SIZE={size}, but {', '.join(NEEDED)} do not say which process this is and where the first one is"
        raise HardwareError(what, "start it with torchrun or accelerate launch, which set them")
    local_rank, local_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
    local_rank = rank if local_rank is None else local_rank
    return Place(rank, size, local_rank, max(local_size or size, local_rank + 1))


def refuse_several() -> None:
    """Raises HardwareError in a process that a launcher has started as one of several, unless the work is theirs."""
    if of_run().size > 1:
        return
    for name in SIZES:
        if (count := _number(name) or 0) > 1:
            what = f"{name}={count}: a launcher has started several processes, and this work is one process on one GPU"
            raise HardwareError(what, f"{HINT}; torchrun and accelerate launch start qlora.cli.train alone")


def _number(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None
