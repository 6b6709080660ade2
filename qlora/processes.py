"""A run is one process: a launcher that starts several of them is refused by name."""

from __future__ import annotations

import os

from qlora.errors import HardwareError

# How launchers tell a process how many there are: torchrun and accelerate, Open MPI, MPICH and Intel MPI, MVAPICH2.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_several() -> None:
    """Raises HardwareError in a process that a launcher has started as one of several."""
    for name in SIZES:
        value = os.environ.get(name, "").strip()
        if value.isascii() and value.isdecimal() and len(value) < 10 and int(value) > 1:
            what = f"{name}={int(value)}: a launcher has started several processes, and a run is one process on one GPU"
            raise HardwareError(what, "start it without torchrun, accelerate launch or mpirun")
