"""The disks that runs and caches lie on: room, whether they can be written, and how fast, by a small file that goes."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora import disk, files
from qlora.doctor.finding import Figure, Finding, green, red, yellow
from qlora.units import GIB, MIB

WRITTEN_BYTES = 32 * MIB
WRITING_SECONDS = 2.0  # after which a slow disk has shown itself
# Checkpoints of an 8B base at rank 16 take 0.7 GiB each with their moments, its merged model 15 GiB.
LEAST_FREE_BYTES, ROOMY_BYTES = 1 * GIB, 10 * GIB
SLOW_BYTES = 30 * MIB  # a second: a checkpoint of the above takes half a minute then
_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Place:
    """A folder that is written to, and what it is for. It may not exist yet."""

    what: str
    folder: Path


@dataclass(frozen=True)
class PlaceFacts:
    """What was measured in a place, or the nearest folder above it that exists; `error` is what the system refused."""

    place: Place
    free_bytes: int = 0
    total_bytes: int = 0
    bytes_per_second: float | None = None
    error: OSError | None = None


def findings(place: Place, measure: Callable[[Place], PlaceFacts] | None = None) -> list[Finding]:
    return [judged((measure or measured)(place))]


def judged(facts: PlaceFacts) -> Finding:
    """The line of a place. Where it lies is for who sits here."""
    name, here, free = f"disk: {facts.place.what}", str(facts.place.folder), facts.free_bytes
    if (error := facts.error) is not None:
        reason = error.strerror or type(error).__name__
        if error.errno == errno.EFBIG:
            return red(name, "a limit lets no file be of some MiB", "raise it: ulimit -f unlimited", here)
        if error.errno == errno.ENOENT:
            return red(name, "the folder that you are in is gone", "go into one that is there (cd)", here)
        if error.errno in disk.DISK_FULL:
            return red(
                name, f"is full: {reason}", "make room there: qlora-doctor with `caches` lists what may go", here
            )
        if error.errno in _ACCESS:
            how = "is read-only" if error.errno == errno.EROFS else "cannot be written"
            return red(name, f"{how}: {reason}", _elsewhere(facts.place), here)
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            return red(name, f"cannot be a folder: {reason}", _elsewhere(facts.place), here)
        return red(name, f"does not work: {reason}", "look at the disk (dmesg), or use another place", here)
    speed = "" if facts.bytes_per_second is None else f", written at {facts.bytes_per_second / MIB:,.0f} MiB a second"
    said = f"{free / GIB:,.1f} of {facts.total_bytes / GIB:,.1f} GiB are free{speed}"
    figures: dict[str, Figure] = {
        "free_bytes": free,
        "total_bytes": facts.total_bytes,
        "bytes_per_second": facts.bytes_per_second,
    }
    if free < LEAST_FREE_BYTES:
        return red(name, said, "make room there: qlora-doctor with `caches` lists what may go", here, figures=figures)
    if free < ROOMY_BYTES:
        return yellow(
            name, f"{said}: little for merged models", "make room there, or use another disk", here, figures=figures
        )
    if facts.bytes_per_second is not None and facts.bytes_per_second < SLOW_BYTES:
        return yellow(name, f"{said}: slow for checkpoints", _elsewhere(facts.place), here, figures=figures)
    return green(name, said, here, figures=figures)


def _elsewhere(place: Place) -> str:
    return {
        "runs": "name another folder in output.dir, or give yourself the right to write there",
        "tokens": "name another folder in QLORA_CACHE, or give yourself the right to write there",
        "hub": "name another folder in HF_HOME, or give yourself the right to write there",
    }.get(place.what, "name another folder in TMPDIR, or give yourself the right to write there")


def measured(place: Place) -> PlaceFacts:
    """Room and speed. The small file is gone behind it, whatever happens."""
    try:
        folder = existing(place.folder)
        usage = shutil.disk_usage(folder)
        speed = written(folder)
    except OSError as error:
        return PlaceFacts(place, error=error)
    return PlaceFacts(place, usage.free, usage.total, speed)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it: there the rest is made. Raises OSError for a file."""
    if why := files.unreachable(folder):
        raise OSError(errno.ENAMETOOLONG, why, str(folder))
    here = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), folder)
    if not here.is_dir():
        raise OSError(errno.ENOTDIR, "a file is where the folder should be", str(here))
    return here.resolve()


def written(folder: Path) -> float:
    """Bytes a second of one file, flushed to the disk. Raises OSError."""
    file = disk.hidden(folder / "write-test", "tmp")  # a run sweeps it away, should we be killed
    block = os.urandom(MIB)  # no file system makes less of it
    count, began = 0, time.monotonic()
    try:
        with disk.open_to_write(file, "new", 0o600) as stream:
            while count < WRITTEN_BYTES and time.monotonic() - began < WRITING_SECONDS:
                files.write_all(stream, block)
                count += len(block)
            os.fsync(stream.fileno())
        return count / max(1e-9, time.monotonic() - began)
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def usual(runs: Path, hub: Path | None, temporary: Path) -> Sequence[Place]:
    """Where this program writes."""
    places = [Place("runs", runs), Place("tokens", disk.cache_dir())]
    places += [Place("hub", hub)] if hub is not None else []
    return [*places, Place("temporary", temporary)]
