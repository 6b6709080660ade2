"""What runs on this machine's GPU measured beside what was predicted, and the correction that later estimates take.

One small JSON file in the cache folder. An estimate reports by how many runs it was calibrated.

Beside it the folder `proofs/` takes what `python -m qlora.prove` writes as JSON, this machine's or another's: a file
counts as one run on the card that it names.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qlora import disk, foreign_json
from qlora.foreign_json import ForeignFileError

FILE = "memory-calibration.json"
KEPT_PAIRS = 50
RECENT_PAIRS = 20
MAX_BYTES = 100_000  # of the file: a pair takes 200
PROOFS = "proofs"  # the folder, in the cache, of JSON files that proofs have written
MAX_PROOFS, MAX_PROOF_BYTES = 20, 500_000  # the newest; thirteen proofs take 10,000
_MEMORY = "memory"  # the proof that compares a predicted peak with a measured one
_PREDICTED, _MEASURED = "predicted_tensor_bytes", "measured_tensor_bytes"
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


def keep(proofs: Mapping[str, Any]) -> Path | None:
    """Put what proofs found where estimates read it; None where nothing in it is of a card, or it cannot be written."""
    text = json.dumps(proofs, indent=1) + "\n"
    if _pair_of(proofs, "the proofs") is None:
        return None
    file = disk.cache_dir() / PROOFS / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(file, text)
        return file
    return None


def correction(gpu: str) -> Correction:
    """The median ratio of the most recent runs on cards of that name, and how far the worst of them was above it.

    Proofs count as runs that were before those of recipes.
    """
    ratios = [pair.measured_bytes / pair.predicted_bytes for pair in (*_proven(), *_read()) if pair.gpu == gpu]
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


class _Hardware(foreign_json.ForeignModel):
    device: Annotated[str, Field(max_length=200)]


class _Proof(foreign_json.ForeignModel):
    name: str
    measured: dict[str, Any]


class _Proofs(foreign_json.ForeignModel):
    """What of the proofs' JSON is read (prove/report.py, format 1)."""

    format: Literal[1]
    hardware: _Hardware
    versions: dict[str, str]
    proofs: Annotated[list[_Proof], Field(max_length=200)]


def _proven() -> list[Pair]:
    """A pair of each of the newest files; what is none of ours is as good as none."""
    folder, found = disk.cache_dir() / PROOFS, list[tuple[float, Path]]()
    with suppress(OSError):
        found = [(os.lstat(file).st_mtime, file) for file in folder.glob("*.json")]
    pairs = []
    for _, file in sorted(found)[-MAX_PROOFS:]:
        with suppress(ForeignFileError):
            pairs.append(_pair_of(foreign_json.load(file, MAX_PROOF_BYTES), file.name))
    return [pair for pair in pairs if pair is not None]


def _pair_of(content: Any, where: str) -> Pair | None:
    """Of the settings that were measured on a card, the one that took most beside what was said; None without any.

    One pair, not one a setting: they are of one model, and say little of how far another is off.
    Raises ForeignFileError.
    """
    proofs = foreign_json.checked(_Proofs, content, where)
    pairs = []
    for measured in (proof.measured for proof in proofs.proofs if proof.name == _MEMORY):
        for key in (name.removesuffix(_PREDICTED) for name in measured if name.endswith(_PREDICTED)):
            values = {"predicted_bytes": measured[key + _PREDICTED], "measured_bytes": measured.get(key + _MEASURED)}
            named = {"gpu": proofs.hardware.device, "torch": proofs.versions.get("torch", "")}
            pairs.append(foreign_json.checked_dataclass(Pair, {**named, **values}, where))
    return max(pairs, key=lambda pair: pair.measured_bytes / pair.predicted_bytes, default=None)
