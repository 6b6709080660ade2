"""What runs on this machine's GPU measured beside what was predicted, and the correction that later estimates take.

One small JSON file in the cache folder. An estimate reports by how many runs it was calibrated.
"""

from __future__ import annotations

import json
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora import disk, foreign_json
from qlora.foreign_json import ForeignFileError

FILE = "memory-calibration.json"
KEPT_PAIRS = 50
RECENT_PAIRS = 20
MAX_BYTES = 100_000  # of the file: a pair takes 200
# A pair outside of this is a run that something else disturbed, not a wrong model: it is not believed.
PLAUSIBLE = (0.8, 1.25)


@dataclass(frozen=True)
class Pair:
    """One run: live bytes of tensors at their peak, as predicted and as the allocator counted them."""

    gpu: str
    torch: str
    predicted_bytes: Annotated[int, Field(gt=0)]
    measured_bytes: Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Correction:
    """Factor for the bytes of tensors, from `runs` pairs; 1.0 from none.

    `spread` is the share by which the worst of those runs took more than the factor says.
    """

    factor: float = 1.0
    runs: int = 0
    spread: float = 0.0


def path() -> Path:
    return disk.cache_dir() / FILE


def add(pair: Pair) -> None:
    """Remember a pair; the oldest ones of many are forgotten. A folder that cannot be written is no reason to fail."""
    pairs = [*_read(), pair][-KEPT_PAIRS:]
    with suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(path(), json.dumps([asdict(one) for one in pairs], indent=1) + "\n")


def correction(gpu: str) -> Correction:
    """The median ratio of the most recent runs on cards of that name, and how far the worst of them was above it."""
    ratios = [pair.measured_bytes / pair.predicted_bytes for pair in _read() if pair.gpu == gpu]
    believed = [ratio for ratio in ratios[-RECENT_PAIRS:] if PLAUSIBLE[0] <= ratio <= PLAUSIBLE[1]]
    if not believed:
        return Correction()
    factor = statistics.median(believed)
    return Correction(factor, len(believed), max(believed) / factor - 1)


def _read() -> list[Pair]:
    """What the file holds; a broken file is as good as none."""
    try:
        content = foreign_json.load(path(), MAX_BYTES)
    except ForeignFileError:
        return []
    pairs = []
    for item in content if isinstance(content, list) else ():
        with suppress(ForeignFileError):
            pairs.append(foreign_json.checked_dataclass(Pair, item, FILE))
    return pairs
