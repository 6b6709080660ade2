"""What this program has left on the disk beside results: caches, reports of crashes, unfinished work, things set aside.

A list first; what is cleared is asked for by its kind, and only what is surely ours goes: a cached folder that its
manifest makes ours and unchanged, a name that only we give, a run or a part of one that was set aside. Nothing is
removed through a link, and nothing of another user's. The hub's cache is huggingface_hub's: it is measured, and stays.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora import disk, files, hub, lock, manifest, run_record
from qlora.errors import foreign_failures

Kind = Literal["tokens", "reports", "unfinished", "set-aside", "measured", "hub"]
CLEARED: tuple[Kind, ...] = ("tokens", "reports", "unfinished", "set-aside")
MOST_ENTRIES = 10_000  # of one folder
# Folders of ours among the temporary ones, which a process that was killed has left: none of us needs one for a day.
TEMPORARY = re.compile(r"qlora-(?:prove|rows|runtime)-[A-Za-z0-9_]{6,12}")
OLD_SECONDS = 24 * 3600
_SET_ASIDE = re.compile(r"(?P<name>.+)\.(?:broken)?[1-9][0-9]{0,5}")
_REPORT = re.compile(r"crash-[0-9]{1,10}\.txt")
_ENTRY = re.compile(r"[0-9a-f]{32}")
_PID = re.compile(r"-(?P<pid>[0-9]{1,10})(?:-[0-9a-f]{8})?")


@dataclass(frozen=True)
class Kept:
    """Something that lies there; `stays` says why it is not cleared, "" for what may be."""

    kind: Kind
    path: Path
    bytes: int
    said: str
    stays: str = ""


@dataclass(frozen=True)
class Places:
    """Where to look: the cache of ours, the hub's (None where it isn't known), folders of runs, temporary files."""

    cache: Path
    hub: Path | None
    runs: Path
    temporary: Path

    @classmethod
    def usual(cls, runs: Path) -> Places:
        """Raises UserError where a cache has no place."""
        return cls(disk.cache_dir(), hub_folder(), runs, temporary_folder())


def hub_folder() -> Path | None:
    """The hub's cache; None where huggingface_hub is missing or broken."""
    with foreign_failures(trial=True):
        return hub.cache_folder().resolve()
    return None


def temporary_folder() -> Path:
    """Where temporary files go, or would, were there one that can be written: on a full disk there is none."""
    try:
        return Path(tempfile.gettempdir()).resolve()
    except OSError:
        return Path(os.environ.get("TMPDIR") or os.environ.get("TEMP") or os.path.join(os.sep, "tmp"))


def listed(places: Places) -> list[Kept]:
    """All that was found, by kind. What cannot be looked at is left out."""
    found = [*_cached(places.cache), *_temporary(places.temporary), *_of_runs(places.runs)]
    if places.hub is not None and places.hub.is_dir():
        said = "models and data sets of the hub (its own command clears them: hf cache)"
        found.append(Kept("hub", places.hub, disk.size_of(places.hub), said, "it is huggingface_hub's"))
    return found


def clear(entries: Sequence[Kept], kinds: Sequence[str]) -> Iterator[tuple[Kept, str]]:
    """Remove the entries of these kinds; each with why it stayed after all, "" where it is gone."""
    for entry in entries:
        if entry.kind in kinds and not entry.stays:
            yield entry, _removed(entry)


def _removed(entry: Kept) -> str:
    if why := _not_ours(entry.path):  # time has passed since it was listed
        return why
    try:
        if entry.path.is_dir():
            disk.discard(entry.path)
        else:
            entry.path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


# --- where things lie ------------------------------------------------------------------------------------------------


def _cached(root: Path) -> Iterator[Kept]:
    """`tokens/<key>`, `crashes/crash-<pid>.txt`, and the pairs that estimates are corrected by."""
    for folder in (root, root / "tokens", root / "crashes"):
        yield from _unfinished(folder)
    for entry in _entries(root / "tokens"):
        if _ENTRY.fullmatch(entry.name):
            yield _published(entry, "tokens", "tokenized rows", ("tokens", None))
        elif (aside := _SET_ASIDE.fullmatch(entry.name)) and _ENTRY.fullmatch(aside["name"]):
            yield _published(entry, "set-aside", "tokenized rows that had been changed", ("tokens", None))
    for entry in _entries(root / "crashes"):
        if _REPORT.fullmatch(entry.name):
            yield _plain(entry, "reports", "an internal error's traceback")
    for name, said in (("memory-calibration.json", "memory measured in runs"), ("proofs", "memory measured by proofs")):
        if os.path.lexists(place := root / name):
            yield Kept("measured", place, _bytes(place), f"{said}, which estimates read", "estimates are worse without")


def _temporary(folder: Path) -> Iterator[Kept]:
    for entry in _entries(folder):
        if TEMPORARY.fullmatch(entry.name) and not _not_ours(entry):
            with suppress(OSError):
                status = os.lstat(entry)
                closed = os.name == "nt" or not stat.S_IMODE(status.st_mode) & 0o077
                if closed and time.time() - status.st_mtime > OLD_SECONDS:
                    yield Kept("unfinished", entry, _bytes(entry), "temporary files of a process that was killed")


def _of_runs(folder: Path) -> Iterator[Kept]:
    """Runs that a fresh start set aside, and what was set aside inside of runs."""
    yield from _unfinished(folder)
    for run in _entries(folder):
        if files.is_link(run) or not run.is_dir() or not run_record.is_run(run):
            continue
        aside, recorded = _SET_ASIDE.fullmatch(run.name), run_record.recorded_folder(run)
        # A run may be called `v1.2`: it was set aside where it was recorded under the name without the number.
        if aside and recorded is not None and recorded.name == aside["name"]:
            yield Kept(
                "set-aside", run, _bytes(run), "a run that a fresh start set aside", _not_ours(run) or _busy(run)
            )
        else:
            yield from _of_run(run)


def _of_run(run: Path) -> Iterator[Kept]:
    for folder in (run, run / "checkpoints", run / "export"):
        if files.is_link(folder):
            continue
        yield from _unfinished(folder)
        for entry in _entries(folder):
            aside = _SET_ASIDE.fullmatch(entry.name)
            if aside is None:
                continue
            if folder == run and aside["name"] == "events.jsonl":
                yield _plain(entry, "set-aside", "events of a run")
            elif folder == run and aside["name"] == "adapter":
                yield _published(entry, "set-aside", "an adapter that had been changed", ("adapter",), changed=True)
            elif folder.name == "checkpoints" and aside["name"].startswith("step-"):
                yield _published(entry, "set-aside", "a damaged checkpoint", ("checkpoint", None), changed=True)
            elif folder.name == "export" and os.path.lexists(folder / aside["name"]):
                yield _published(entry, "set-aside", "an export that had been changed", ("export",), changed=True)


def _unfinished(folder: Path) -> Iterator[Kept]:
    for entry in _entries(folder):
        if disk.is_leftover(entry):
            pid = _PID.search(entry.name)
            running = "its process runs" if pid and lock.is_running(int(pid["pid"])) else ""
            said = "left half written by a process that was killed"
            yield Kept("unfinished", entry, _bytes(entry), said, running or _not_ours(entry))


def _published(folder: Path, kind: Kind, said: str, kinds: tuple[str | None, ...], changed: bool = False) -> Kept:
    """A folder with a manifest of ours. One that somebody has changed is cleared only where that set it aside."""
    standing = manifest.standing(folder, hashes=False)
    stays = _not_ours(folder)
    if not stays and (standing.whose not in ("ours", "changed") or standing.kind not in kinds):
        # A damaged checkpoint may have lost its manifest; its folder's name and its place are ours.
        stays = "" if "damaged" in said and folder.is_dir() else standing.why or "it is not ours"
    if not stays and standing.whose == "changed" and not (changed or kind == "set-aside"):
        stays = f"somebody has changed it ({standing.why})"
    return Kept(kind, folder, _bytes(folder), said, stays)


def _plain(file: Path, kind: Kind, said: str) -> Kept:
    stays = _not_ours(file) or ("" if file.is_file() else "it is not a file")
    return Kept(kind, file, _bytes(file), said, stays)


# --- whose it is -----------------------------------------------------------------------------------------------------


def _not_ours(path: Path) -> str:
    """Why something is left alone whatever it is called: a link, the folder a link, another user's; "" otherwise.

    What lies in a folder counts too: somebody may have put a folder of theirs into one of ours.
    """
    if any(map(files.is_link, (path, *path.parents))):  # where to look was resolved: none is the user's own
        return "it is a link, or lies behind one"
    try:
        found = [os.lstat(path), *(manifest.contents(path).values() if path.is_dir() else ())]
    except OSError as error:
        return f"it cannot be looked at ({error.strerror or error})"
    me = os.geteuid() if hasattr(os, "geteuid") else None
    return "it is another user's" if me is not None and any(one.st_uid != me for one in found) else ""


def _busy(run: Path) -> str:
    try:
        lock.check_free(run / run_record.LOCK_FILE)
    except (lock.LockHeld, files.UnsafePathError, OSError):
        return "a process works in it"
    return ""


def _bytes(path: Path) -> int:
    if path.is_dir() and not files.is_link(path):
        return disk.size_of(path)
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def _entries(folder: Path) -> list[Path]:
    try:
        if files.is_link(folder):
            return []
        with os.scandir(folder) as found:
            return sorted(Path(entry.path) for _, entry in zip(range(MOST_ENTRIES), found, strict=False))
    except OSError:
        return []
