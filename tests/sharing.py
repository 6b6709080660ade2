"""Two processes over gloo that gather, without a run: forks of a test, each with its side of the gathers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qlora import gathering
from qlora.copy_stream import CopyStream
from qlora.errors import QloraError, TrainingStopped
from qlora.gathering import Gathers, Network
from qlora.processes import Place, taken
from tests.attacks.terminals import begun
from tests.together import Ended, _wait, free_port

SECONDS = 60.0
CPU = torch.device("cpu")
Work = Callable[[Gathers], Any]


class Parts:
    """A holder of parts of ten things on the CPU, whose bytes are their numbers."""

    def __init__(self, gathers: Gathers, part_bytes: int = 16) -> None:
        self.size, self.part_bytes = gathers.place.size, part_bytes
        self.landing, self.forgotten = torch.zeros(self.size * part_bytes, dtype=torch.uint8), 0
        gathers.holder, self.gathers = self, gathers

    def part(self, number: int) -> torch.Tensor:
        return torch.full((self.part_bytes,), 10 * number + self.gathers.place.rank, dtype=torch.uint8)

    def forget(self) -> None:
        self.forgotten += 1

    def room(self) -> tuple[torch.Tensor, CopyStream]:
        return self.landing, CopyStream(CPU)

    def get(self, number: int) -> list[int]:
        """A thing's parts, as they came."""
        slot = torch.zeros(self.size * self.part_bytes, dtype=torch.uint8)
        self.gathers.want(number, slot, CopyStream(CPU), None).result()
        return slot[:: self.part_bytes].tolist()


def whole(*numbers: int, size: int = 2) -> list[list[int]]:
    return [[10 * number + rank for rank in range(size)] for number in numbers]


def share(folder: Path, *works: Work, seconds: float = 5.0) -> tuple[Ended, list[Any]]:
    """Each work in a process of its own: exit codes and words of those that raised, and what each gave."""
    port, pids, folder = free_port(), [], folder / "shared"
    folder.mkdir(exist_ok=True)
    for rank, work in enumerate(works):
        place = Place(rank, len(works), rank, len(works))
        told = folder / f"{rank}.json"
        pids.append(begun(_side(place, work, port, told, seconds), {0: os.devnull}, {}))
    codes = [_wait(pid, _until()) for pid in pids]
    given = [json.loads(path.read_text()) if (path := folder / f"{rank}.json").is_file() else None for rank in range(2)]
    said = [one["raised"] if isinstance(one, dict) and "raised" in one else "" for one in given]
    return Ended(codes, said), given


def _until() -> float:
    import time

    return time.monotonic() + SECONDS


def _side(place: Place, work: Work, port: int, told: Path, seconds: float) -> Callable[[], None]:
    def side() -> None:
        os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
        wires = Network(place, None, lambda error: TrainingStopped(f"gone: {error}", ""), timedelta(seconds=SECONDS))
        gathers, code = Gathers(wires, lambda: None, seconds, seconds), 0
        try:
            with taken(place), gathering.taken(gathers):
                given = work(gathers)
        except QloraError as error:
            given, code = {"raised": error.what}, error.exit_code
        told.write_text(json.dumps(given))
        os._exit(code)

    return side
