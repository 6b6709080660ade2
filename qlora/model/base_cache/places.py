"""Where bases are kept in 4 bit: their names, whose they are, which one is in use, and which one goes first.

    bases/<content>-<nf4|fp4>-<double|single>-<form>/   one base: blobs of layers, other tensors, manifest.json
    bases/<the same>.seen                               the files that were found to hold that content, by size and time
    bases/<the same>.use-<process>-<number>             a process reads it: a lock, gone with the process
    bases/.lock                                         a process writes one, or makes room

When a base was used last is the time of its `.seen`. Whatever fails here costs a start its speed and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from qlora import disk, files, foreign_json, lock, manifest
from qlora.recipe.sections import MemorySection

FOLDER, KIND = "bases", "base"
NAME = re.compile(r"[0-9a-f]{32}-(?:nf4|fp4)-(?:double|single)-[0-9a-f]{16}")
SET_ASIDE = ".broken"
_SEEN, _LOCK = ".seen", ".lock"
_BESIDE = re.compile(rf"(?P<name>{NAME.pattern})(?:(?P<seen>\.seen)|\.use-[0-9]{{1,10}}-[0-9a-f]{{8}})")
_MOST_SEEN, _MAX_SEEN_BYTES = 8, 1_000_000  # copies of one base that a person has; of a file with each one's shards
_MOST_ENTRIES = 10_000

Stamp = tuple[Annotated[int, Field(ge=0)], int]  # bytes, and when it was last written (nanoseconds)
Stamps = Mapping[str, Stamp]  # of each weight file of a base, by its name: paths are no identity


Mode = Literal["auto"] | bool  # memory.cache
# "auto" keeps nothing of a base whose files have less: they are read and put into 4 bit in 2 to 3 seconds (0.5 G
# weights; 310 M a second and thread on the CPU, see nf4), when importing torch and transformers alone takes longer.
LEAST_BYTES = 1 << 30


def mode_beside(memory: MemorySection | None) -> Mode:
    """For what is done with a run, or without one (None): the run's no is one here too, its yes is the run's alone."""
    return False if memory is not None and memory.cache is False else "auto"


class _Seen(foreign_json.ForeignModel):
    places: Annotated[list[dict[str, list[int]]], Field(max_length=_MOST_SEEN)]


class Held(NamedTuple):
    """A base that is kept: its folder, its bytes, when it was used last (seconds)."""

    folder: Path
    bytes: int
    used: float


def root() -> Path:
    """The folder of them all, which may not exist yet. Raises UserError where the cache has no place, OSError."""
    return disk.cache_dir().resolve() / FOLDER


def distrusted(folder: Path) -> str | None:
    """Why what lies in a folder of `root()` is not read; None where nobody but us and root can have written it."""
    return files.distrust(folder.parent.parent, folder.parent, folder) or files.distrust(_beside(folder, _SEEN))


def held(bases: Path) -> list[Held]:
    """All that are there, those that were set aside too, the one that was used longest ago first."""
    found = []
    for folder in _entries(bases):
        whole = NAME.fullmatch(folder.name)
        if (whole or NAME.fullmatch(folder.name.partition(SET_ASIDE)[0])) and folder.is_dir():
            found.append(Held(folder, disk.size_of(folder), last_used(folder)))
    return sorted(found, key=lambda one: one.used)


def last_used(folder: Path) -> float:
    """Seconds since the epoch; 0 where that cannot be seen."""
    for place in (_beside(folder, _SEEN), folder):
        with suppress(OSError):
            return os.lstat(place).st_mtime
    return 0.0


# --- where a base was seen -------------------------------------------------------------------------------------------


def was_seen(folder: Path, stamps: Stamps) -> bool:
    """Whether files of these sizes and times were read from front to back, and held the content of `folder`."""
    wanted = {name: list(stamp) for name, stamp in stamps.items()}
    return wanted in _seen(folder)


def see(folder: Path, stamps: Stamps) -> None:
    """Remember that these files hold the content of `folder`. Raises OSError."""
    now = {name: list(stamp) for name, stamp in stamps.items()}
    before = [place for place in _seen(folder) if place != now]
    text = json.dumps({"places": [now, *before][:_MOST_SEEN]})
    disk.write_atomic(_beside(folder, _SEEN), text, 0o600)


def touch(folder: Path) -> None:
    """It is used now. In a folder that cannot be written to, nothing happens."""
    with suppress(OSError):
        os.utime(_beside(folder, _SEEN))


def _seen(folder: Path) -> list[dict[str, list[int]]]:
    try:
        read = foreign_json.load_object(_beside(folder, _SEEN), _MAX_SEEN_BYTES)
        return foreign_json.checked(_Seen, read, _SEEN).places
    except foreign_json.ForeignFileError:  # none, or no sound one: then the original is read once more
        return []


# --- who uses one ----------------------------------------------------------------------------------------------------


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Nobody makes room with this one for the time of the block. Nothing is locked where nothing can be written."""
    file = folder.with_name(f"{folder.name}.use-{os.getpid()}-{secrets.token_hex(4)}")
    held = None
    with suppress(OSError, lock.LockHeld, files.UnsafePathError):
        held = lock.acquire(file)
    try:
        yield
    finally:
        if held is not None:
            with suppress(OSError):
                file.unlink(missing_ok=True)
            held.release()


def in_use(folder: Path) -> bool:
    """Whether a process reads it."""
    beside = ((file, _BESIDE.fullmatch(file.name)) for file in _entries(folder.parent))
    return any(
        found and found["name"] == folder.name and not found["seen"] and _is_held(file) for file, found in beside
    )


def _is_held(file: Path) -> bool:
    try:
        lock.check_free(file)
    except (lock.LockHeld, OSError, files.UnsafePathError):
        return True
    return False


@contextmanager
def writing(bases: Path) -> Iterator[None]:
    """The folder is there, and nobody else writes into it or makes room for the time of the block.

    Raises LockHeld, OSError, UnsafePathError.
    """
    for folder in (bases.parent, bases):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    taken = lock.acquire(bases / _LOCK)
    try:
        disk.sweep_leftovers(bases, spare_running=True)
        for file in _entries(bases):
            if (found := _BESIDE.fullmatch(file.name)) and not files.is_link(file):
                there = os.path.lexists(file.with_name(found["name"])) if found["seen"] else _is_held(file)
                if not there:  # removed by hand; left by a process that was killed
                    file.unlink(missing_ok=True)
        yield
    finally:
        taken.release()


# --- room ------------------------------------------------------------------------------------------------------------


def make_room(bases: Path, needed_bytes: int, most_bytes: int) -> list[Held]:
    """Remove what was used longest ago until `needed_bytes` more are at most `most_bytes` in sum. Returns what went.

    Only whole ones of ours that nobody uses go; where those are not enough, none does.
    """
    found = held(bases)
    over = sum(one.bytes for one in found) + needed_bytes - most_bytes
    going: list[Held] = []
    for one in found:
        if over <= sum(gone.bytes for gone in going):
            break
        if NAME.fullmatch(one.folder.name) and _is_ours(one.folder) and not in_use(one.folder):
            going.append(one)
    if over > sum(gone.bytes for gone in going):
        return []
    return [one for one in going if remove(one.folder)]


def remove(folder: Path) -> bool:
    """Remove one, which is known to be ours, and what is remembered of it; whether it is gone."""
    with suppress(OSError):
        gone = disk.discard(folder)
        _beside(folder, _SEEN).unlink(missing_ok=True)
        return gone
    return False


def _is_ours(folder: Path) -> bool:
    standing = manifest.standing(folder, hashes=False)
    return standing.whose == "ours" and standing.kind == KIND


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f"{folder.name}{ending}")


def _entries(folder: Path) -> list[Path]:
    try:
        if files.is_link(folder):
            return []
        with os.scandir(folder) as found:
            return sorted(Path(entry.path) for _, entry in zip(range(_MOST_ENTRIES), found, strict=False))
    except OSError:
        return []
