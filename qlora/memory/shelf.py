"""Simulations that were made before, on the disk: the same question is answered without drawing a model again.

A file a simulation, a few KB each, in the cache's folder `simulations`, under a hash of all that it follows from: the
configuration, what is made of it, the workload, the versions of the libraries and of Python, and the bytes of our own
source. It is read as if a stranger had written it, and what is not sound is simulated again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from qlora import disk, files, foreign_json
from qlora.errors import UserError
from qlora.manifest import sha256_text
from qlora.memory import tape
from qlora.memory.operations import Layers, Operation, Operations, Work
from qlora.memory.simulation import Drawn, ModelSpec, Simulation, ValueCounts, Workload
from qlora.memory.trace import CATEGORIES, Peak

FOLDER = "simulations"
KEPT_FILES = 200
MAX_BYTES = 60_000  # of a file: with all phases and a step's operations it has 9,000
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
ALWAYS = ("load", "forward", "update", "selfcheck")  # phases that every run has
Count = Annotated[int, Field(ge=0, le=1 << 60)]


class Shelved(NamedTuple):
    """What a simulation gives, and what it found of the model."""

    drawn: Drawn
    simulation: Simulation


@dataclass(frozen=True)
class _Peak:
    parts: dict[str, Count]
    slack: Annotated[int, Field(ge=-(1 << 60), le=1 << 60)]
    reserved: Count


_Times = Annotated[float, Field(ge=-1e9, le=1e9)]
# Bytes, arithmetic, whether it attends, of grouped products experts, rows, and whether they loop; how often.
_Operations = Annotated[tuple[tuple[Count, Count, bool, Count, Count, bool, _Times], ...], Field(max_length=4096)]


@dataclass(frozen=True)
class _Layers:
    count: Annotated[float, Field(gt=0, le=1e9)]
    up: _Operations
    down: _Operations


@dataclass(frozen=True)
class _Work:
    layers: Annotated[tuple[_Layers, ...], Field(min_length=1, max_length=1)]
    outside: _Operations
    update: tuple[Annotated[float, Field(ge=0, le=1e9)], Annotated[float, Field(ge=0, le=1e18)]]


@dataclass(frozen=True)
class _File:
    """A file's content. `drawn` are the four counts of values, then bytes: a baseline's cast ones, the host's, and
    of these those of tables and of a head, and those of stacks of experts."""

    key: str
    drawn: Annotated[tuple[Count, ...], Field(min_length=9, max_length=9)]
    phases: Annotated[dict[str, _Peak], Field(max_length=32)]
    kept: dict[str, Count]
    paged: Count
    reserved: Annotated[tuple[Count, ...], Field(min_length=2, max_length=2)]
    each: dict[str, Count]
    first: Count
    held: Count
    pinned: Count
    work: _Work | None


class Shelf:
    """The cache's folder of simulations. What cannot be written or read is as good as not there."""

    def key(self, spec: ModelSpec, workload: Workload, sizes: Sequence[int]) -> str:
        """A hash of all that a simulation follows from; `sizes` are the models that are drawn."""
        config = {name: value for name, value in spec.text.to_dict().items() if name != "_name_or_path"}
        made_of = (
            spec.lora.model_dump_json(),
            spec.quantization.model_dump_json(),
            repr(spec.baseline),
            repr(spec.place),
        )
        run = (spec.kernel, spec.functions, spec.loss_chunk, spec.head_block, spec.dtype, spec.experts)
        settings = (spec.attention, spec.target, *map(str, run), str(sizes), repr(workload))
        said = json.dumps(config, sort_keys=True, default=str)
        return sha256_text(type(spec.text).__name__, said, *made_of, *settings, *_versions())

    def get(self, key: str) -> Shelved | None:
        try:
            file = _folder() / f"{key}.json"
            read = foreign_json.checked_line(_File, files.read_bytes(file, MAX_BYTES), file.name)
        except (OSError, UserError, files.UnsafePathError, foreign_json.ForeignFileError):
            return None
        return _shelved(read) if _is_sound(read, key) else None

    def put(self, key: str, found: Shelved) -> None:
        """Keeps it, and forgets the oldest ones of many."""
        drawn, simulation = found
        content = _File(
            key=key,
            drawn=(*drawn.values, *drawn[1:]),
            phases={
                name: _Peak(dict(peak.parts), peak.slack, peak.reserved) for name, peak in simulation.phases.items()
            },
            kept=dict(simulation.kept),
            paged=simulation.paged,
            reserved=tuple(simulation.reserved),
            each=dict(simulation.each),
            first=simulation.first,
            held=simulation.held,
            pinned=simulation.pinned,
            work=None if simulation.work is None else _written(simulation.work),
        )
        with suppress(OSError, UserError, files.UnsafePathError):
            folder = _folder()
            disk.make_folder(folder)
            disk.sweep_leftovers(folder, spare_running=True)
            disk.write_atomic(folder / f"{key}.json", json.dumps(asdict(content)) + "\n")
            by_age = sorted(folder.glob("*.json"), key=lambda file: file.lstat().st_mtime_ns)
            for old in by_age[:-KEPT_FILES]:
                old.unlink(missing_ok=True)


def _folder() -> Path:
    return disk.cache_dir() / FOLDER


def _is_sound(read: _File, key: str) -> bool:
    """Whether it is of this question, and has what every simulation has."""
    categories = set(CATEGORIES)
    parts = [read.kept, *(peak.parts for peak in read.phases.values())]
    whole = all(set(one) == categories for one in parts) and all(name in read.phases for name in ALWAYS)
    whole = whole and read.each.keys() == read.phases.keys()
    return read.key == key and whole and read.reserved[0] >= read.reserved[1]


def _shelved(read: _File) -> Shelved:
    phases: Mapping[str, Peak] = {
        name: Peak(peak.parts, peak.slack, peak.reserved) for name, peak in read.phases.items()
    }
    drawn = Drawn(ValueCounts(*read.drawn[:4]), *read.drawn[4:])
    reserved = tape.Reserved(*read.reserved)
    work = None if read.work is None else _read(read.work)
    more = (read.first, read.held, read.pinned, work)
    return Shelved(drawn, Simulation(phases, read.kept, read.paged, reserved, read.each, *more))


def _written(work: Work) -> _Work:
    def flat(operations: Operations) -> Any:
        return tuple((*operation, times) for operation, times in operations)

    layers = tuple(_Layers(group.count, flat(group.up), flat(group.down)) for group in work.layers)
    return _Work(layers, flat(work.outside), work.update)


def _read(work: _Work) -> Work:
    def read(operations: _Operations) -> Operations:
        return tuple((Operation(*one[:-1]), one[-1]) for one in operations)

    layers = tuple(Layers(group.count, read(group.up), read(group.down)) for group in work.layers)
    return Work(layers, read(work.outside), work.update)


@cache
def _versions() -> tuple[str, ...]:
    """Of the libraries and Python, and a hash of our own source: 3 MB of it, read once a process."""
    package = Path(disk.__file__).parent
    source = sorted(file.relative_to(package).as_posix() for file in package.rglob("*.py"))
    own = sha256_text(*(f"{name} {(package / name).read_text(encoding='utf-8')}" for name in source))
    return (own, sys.version, *map(_version, LIBRARIES))


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # an own build that is on the path
        return "unknown"
