"""What this program has left on the disk beside results: caches, reports of crashes, unfinished work, things set aside.

A list first; what is cleared is asked for by its kind, and only what is surely ours goes: a cached folder that its
manifest makes ours and unchanged, a report that says what it is, a run that a fresh start set aside and in which there
is nothing but what a run writes. What somebody has changed or put there stays, and is said. What a killed process left
inside of a run stays too: the run itself knows which of it is the only copy, and sweeps it when it goes on. Nothing is
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qlora import disk, files, foreign_json, hub, lock, manifest, run_folder, run_record
from qlora.errors import foreign_failures
from qlora.model.base_cache import places as kept_bases

Kind = Literal["tokens", "bases", "compiled", "reports", "unfinished", "set-aside", "measured", "hub"]
CLEARED: tuple[Kind, ...] = ("tokens", "bases", "compiled", "reports", "unfinished", "set-aside")
MOST_ENTRIES = 10_000  # of one folder
# Folders of ours among the temporary ones, which a process that was killed has left: none of us needs one for a day.
TEMPORARY = re.compile(r"qlora-(?:prove|rows|runtime)-[a-z0-9_]{8}")  # as tempfile makes them
OLD_SECONDS = 24 * 3600
COMPILED, WRITING_SECONDS = "compiled", 600  # of the cache; a graph of a layer is made in a minute at most
_SET_ASIDE = re.compile(r"(?P<name>.+)\.(?:broken)?[1-9][0-9]{0,5}")
_REPORT = re.compile(r"crash-[0-9]{1,10}\.txt")
_OF_COMPILER = re.compile(r"[a-z0-9_]+")  # folders: two letters of a hash, or what is kept (fxgraph, triton)
_ENTRY = re.compile(r"[0-9a-f]{32}")
_BROKEN = re.compile(r"step-[0-9]{6,16}\.broken[1-9][0-9]{0,5}")
_PART = re.compile(r"\..+\.part")  # what an export works in
_TRACEBACK = (b"Traceback (most recent call last)", b"qlora")
_MOST_REPORT_BYTES = 1 << 20
_OF_RUNS = {*run_folder.OURS, "report.html", "trackers"}


@dataclass(frozen=True)
class Kept:
    """Something that lies there; `stays` says why it is not cleared, "" for what may be."""

    kind: Kind
    path: Path
    bytes: int
    said: str
    stays: str = ""

    identity_then: tuple[int, int] | None = field(init=False)  # which file or folder had that name when it was listed

    def __post_init__(self) -> None:
        identity = None
        with suppress(OSError):
            status = os.lstat(self.path)
            identity = (status.st_dev, status.st_ino)
        object.__setattr__(self, "identity_then", identity)


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


def clear(places: Places, entries: Sequence[Kept], kinds: Sequence[str]) -> Iterator[tuple[Kept, str]]:
    """Remove the entries of these kinds; each with why it stayed after all, "" where it is gone.

    `entries` are looked for again: a person may take an hour to agree, and another thing may have the name by then.
    """
    wanted = {one.path: one.identity_then for one in entries if one.kind in kinds and not one.stays}
    for entry in listed(places) if wanted else ():
        if entry.path not in wanted:
            continue
        then = wanted.pop(entry.path)
        yield entry, entry.stays or (_removed(entry) if entry.identity_then == then else "it is another one by now")
    for entry in entries:
        if entry.path in wanted:
            yield entry, "it is not there any more, or a link leads to it now"


def _removed(entry: Kept) -> str:
    try:
        if entry.kind == "bases":
            return "" if kept_bases.remove(entry.path) else "parts of it cannot be removed"
        if entry.path.is_dir():
            return "" if disk.discard(entry.path) else "parts of it cannot be removed"
        entry.path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


# --- where things lie ------------------------------------------------------------------------------------------------


def _cached(root: Path) -> Iterator[Kept]:
    """`tokens/<key>`, `bases/…`, `crashes/crash-<pid>.txt`, and the pairs that estimates are corrected by."""
    for folder in (root, root / "tokens", root / kept_bases.FOLDER, root / "crashes"):
        yield from _unfinished(folder)
    for entry in _entries(root / "tokens"):
        if _ENTRY.fullmatch(entry.name):
            yield _published(entry, "tokens", "tokenized rows", "tokens")
        elif (aside := _SET_ASIDE.fullmatch(entry.name)) and _ENTRY.fullmatch(aside["name"]):
            yield _published(entry, "set-aside", "tokenized rows that had been changed", "tokens")
    yield from _bases(root / kept_bases.FOLDER)
    if os.path.lexists(compiled := root / COMPILED):
        yield _compiled(compiled)
    for entry in _entries(root / "crashes"):
        if _REPORT.fullmatch(entry.name):
            yield _report(entry)
    for name, said in (("memory-calibration.json", "memory measured in runs"), ("proofs", "memory measured by proofs")):
        if os.path.lexists(place := root / name):
            yield Kept("measured", place, _bytes(place), f"{said}, which estimates read", "estimates are worse without")


def _bases(folder: Path) -> Iterator[Kept]:
    """Bases in 4 bit, and those of them that were found damaged."""
    for entry in _entries(folder):
        if kept_bases.NAME.fullmatch(entry.name):
            used = time.strftime("%Y-%m-%d", time.gmtime(kept_bases.last_used(entry)))
            one = _published(entry, "bases", f"{_base_of(entry)} in 4 bit, last used on {used}", kept_bases.KIND)
            yield replace(one, stays=one.stays or ("a process reads it" if kept_bases.in_use(entry) else ""))
        elif (aside := _SET_ASIDE.fullmatch(entry.name)) and kept_bases.NAME.fullmatch(aside["name"]):
            yield Kept("set-aside", entry, _bytes(entry), "a base in 4 bit that was damaged", _not_ours(entry))


def _compiled(folder: Path) -> Kept:
    """What torch's compiler has made of layers; it makes again what is gone. A run that compiles writes to it."""
    stays = _not_ours(folder) or ("" if folder.is_dir() else "it is not a folder")
    others = [one.name for one in _entries(folder) if not (one.is_dir() and _OF_COMPILER.fullmatch(one.name))]
    if not stays and others:
        stays = f"it holds {others[0]}, which the compiler has not made"
    if not stays and time.time() - max(one.st_mtime for one in _statuses(folder)) < WRITING_SECONDS:
        stays = "a process has just written to it"
    return Kept("compiled", folder, _bytes(folder), "layers as torch's compiler made them", stays)


def _base_of(folder: Path) -> str:
    """The base's name, where the manifest says it."""
    with suppress(foreign_json.ForeignFileError):
        if isinstance(name := manifest.read(folder).get("base"), str):
            return name[:200]
    return "a base"


def _temporary(folder: Path) -> Iterator[Kept]:
    for entry in _entries(folder):
        if TEMPORARY.fullmatch(entry.name) and entry.is_dir() and not _not_ours(entry):
            with suppress(OSError):
                closed = os.name == "nt" or not stat.S_IMODE(os.lstat(entry).st_mode) & 0o077
                if closed and _is_old(entry):
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
            stays = _not_ours(run) or _busy(run) or _no_run_alone(run, folder / aside["name"])
            yield Kept("set-aside", run, _bytes(run), "a run that a fresh start set aside", stays)
        else:
            yield from _of_run(run)


def _of_run(run: Path) -> Iterator[Kept]:
    for folder in (run, run / "checkpoints", run / "export"):
        if files.is_link(folder):
            continue
        for one in _unfinished(folder):
            yield replace(one, stays=one.stays or "the run sweeps it when it goes on")
        for entry in _entries(folder):
            aside = _SET_ASIDE.fullmatch(entry.name)
            if aside is None:
                continue
            if folder == run and aside["name"] == "events.jsonl":
                yield _plain(entry, "set-aside", "events of a run")
            elif folder == run and aside["name"] == "adapter":
                yield _published(entry, "set-aside", "an adapter that had been changed", "adapter")
            elif folder.name == "checkpoints" and _BROKEN.fullmatch(entry.name):
                # It may have lost its manifest; its name and its place are ours.
                yield Kept("set-aside", entry, _bytes(entry), "a damaged checkpoint", _not_ours(entry) or _busy(run))
            elif folder.name == "export" and os.path.lexists(folder / aside["name"]):
                yield _published(entry, "set-aside", "an export that had been changed", "export")


def _unfinished(folder: Path) -> Iterator[Kept]:
    """Of a process that has ended, on whichever machine, and that nothing was written to for a day.

    A folder that gave way to its successor (`swap`) may be the only copy: who sweeps it gives it back its name first.
    """
    for entry in _entries(folder):
        left = disk.leftover_at(entry)
        if left is None or left.earlier:
            continue
        stays = "its process runs" if lock.is_running(left.pid) else "" if _is_old(entry) else "it is of today"
        if left.kind == "swap" or (left.kind == "tmp" and not os.path.lexists(folder / left.name)):
            stays = "it may be the only copy" if entry.is_dir() else stays
        said = "left half written by a process that was killed"
        yield Kept("unfinished", entry, _bytes(entry), said, _not_ours(entry) or stays)


def _published(folder: Path, kind: Kind, said: str, of_kind: str) -> Kept:
    """A folder with a manifest of ours. One that somebody has changed, or put there, stays."""
    standing = manifest.standing(folder, hashes=False)
    stays = _not_ours(folder)
    if not stays and (standing.whose not in ("ours", "changed") or standing.kind not in (of_kind, None)):
        stays = standing.why or "it is not ours"
    if not stays and standing.whose == "changed":
        stays = f"somebody has changed it ({standing.why}): look at it, and remove it yourself"
    if not stays and kind == "set-aside":
        stays = "it is whole, so that somebody has put it there: remove it yourself"
    return Kept(kind, folder, _bytes(folder), said, stays)


def _plain(file: Path, kind: Kind, said: str) -> Kept:
    stays = _not_ours(file) or ("" if file.is_file() else "it is not a file")
    return Kept(kind, file, _bytes(file), said, stays)


def _report(file: Path) -> Kept:
    """A traceback, by what it holds: in a folder that a person chose, others may give files such a name."""
    found = _plain(file, "reports", "an internal error's traceback")
    if not found.stays:
        with suppress(OSError, files.UnsafePathError), files.open_to_read(file) as opened:
            held = opened.read(_MOST_REPORT_BYTES)
            if all(word in held for word in _TRACEBACK):
                return found
        found = replace(found, stays="it is no report of ours")
    return found


# --- whose it is -----------------------------------------------------------------------------------------------------


def _not_ours(path: Path) -> str:
    """Why something is left alone whatever it is called: a link, the folder a link, another user's; "" otherwise.

    What lies in a folder counts too: somebody may have put a folder of theirs into one of ours.
    """
    if any(map(files.is_link, (path, *path.parents))):  # where to look was resolved: none is the user's own
        return "it is a link, or lies behind one"
    try:
        found = _statuses(path)
    except OSError as error:
        return f"it cannot be looked at ({error.strerror or error})"
    me = os.geteuid() if hasattr(os, "geteuid") else None
    return "it is another user's" if me is not None and any(one.st_uid != me for one in found) else ""


def _busy(run: Path) -> str:
    """Whether a process trains in a run's folder, or exports from it."""
    locks = [
        run / run_record.LOCK_FILE,
        *(part / "lock" for part in _entries(run / "export") if _PART.match(part.name)),
    ]
    try:
        for one in locks:
            lock.check_free(one)
    except (lock.LockHeld, files.UnsafePathError, OSError):
        return "a process works in it"
    return ""


def _no_run_alone(run: Path, first: Path) -> str:
    """Why a run under another name may be more than what a fresh start set aside: a copy, the only one, or a desk."""
    if not run_record.is_run(first):
        return f"no run is called {first.name} now: this may be the only one"
    if run_record.id_of(run) == run_record.id_of(first):
        return f"it is a copy of {first.name}"
    device = os.lstat(run).st_dev
    for name, status in manifest.contents(run).items():
        if name.partition("/")[0] not in _OF_RUNS or status.st_dev != device:
            return f"it holds {name}, which no run has written"
    parts = [run / "adapter", *_entries(run / "checkpoints"), *_entries(run / "export")]
    for part in (part for part in parts if os.path.lexists(part)):
        if (standing := manifest.standing(part, hashes=False)).whose not in ("ours", "nobody"):
            return f"{part.relative_to(run)} in it is not as the run left it ({standing.why})"
    return ""


def _is_old(path: Path) -> bool:
    """Whether nothing in it was written for a day."""
    try:
        newest: float = max(one.st_mtime for one in _statuses(path))
    except OSError:
        return False
    return time.time() - newest > OLD_SECONDS


def _statuses(path: Path) -> list[os.stat_result]:
    return [os.lstat(path), *(manifest.contents(path).values() if path.is_dir() else ())]


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
