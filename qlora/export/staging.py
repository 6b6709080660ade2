"""Folders of artifacts under way: filled in one pass over the weights, kept through a kill, published by one rename.

Beside each final folder `out` stands a hidden `.out.part` with the files, a lock, and a journal of points from which
writing can go on: how many items (tensors) were complete, how long each file was, and its sha256. Before a point is
written down, its bytes are flushed to the disk. A run that finds a journal of the same work cuts the files back to the
newest point that all artifacts share, hashes what is left, and goes on; a journal of other work is thrown away.

    with StagedExport.open({"hf": out}, identity, needed_bytes) as staged:
        for number, tensor in enumerate(tensors):
            if number >= staged.start:
                staged.append("hf", "model.safetensors", data)
                staged.checkpoint(number + 1)
        staged.publish("hf")

Leaving by a signal keeps the hidden folders, any other exception removes them, and so does a full disk. A folder of
that name which was not made here is somebody's: it is neither used nor removed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from qlora import disk, files, foreign_json, lock, manifest
from qlora.errors import ExportError, StoppedBySignal, TargetTaken
from qlora.export import targets
from qlora.export.hashed_file import HashedFile
from qlora.export.write_blocks import WriteThreads
from qlora.lock import FolderLock, LockHeld
from qlora.manifest import MADE_BY

# A kill costs at most the writing of this much; each point costs a flush of the disk.
RESTART_BYTES = 1 << 30
SPARE_BYTES = 64 << 20  # configuration, tokenizer, index, manifest

_FILES, _LOCK, _JOURNAL, _MARK = "files", "lock", "journal.json", "part.json"
_MAX_JOURNAL_BYTES = 1 << 28  # a terabyte in shards of 5 GB has 20 MB
_SMALL_DISK = "free some space, or name another disk with `out`"

# Where each file of an artifact stood at a point: its bytes, and their sha256 (perhaps still being computed).
_Standing = dict[str, tuple[int, Future[str]]]


class _Mark(foreign_json.ForeignModel):
    """`part.json`: whose a hidden folder is."""

    made_by: Literal["qlora"]
    kind: Literal["part"]


class _Point(foreign_json.ForeignModel):
    item: int
    files: dict[str, list[int | str]]


class _Journal(foreign_json.ForeignModel):
    identity: dict[str, str]
    points: list[_Point]


@dataclass
class _StagedFolder:
    """One artifact under way."""

    final: Path
    lock: FolderLock
    identity: Mapping[str, str]
    files: dict[str, HashedFile] = field(default_factory=dict)
    standing: _Standing = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return _part_of(self.final)

    @property
    def folder(self) -> Path:
        return self.root / _FILES


class StagedExport:
    """Folders of artifacts under way; see above. Made by `open`, used as a context manager."""

    def __init__(self, folders: dict[str, _StagedFolder], start: int, threads: WriteThreads) -> None:
        self.start = start
        self._folders = folders
        self._threads = threads
        self._reached = (start, {key: staged.standing for key, staged in folders.items()})
        self._unsaved_bytes = 0
        self._flushing = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushed: Future[None] | None = None

    @classmethod
    def open(cls, finals: Mapping[str, Path], identity: Mapping[str, str], needed_bytes: int) -> StagedExport:
        """Begin, or go on with, the artifacts `finals` (key to final folder), which need `needed_bytes` in all.

        `identity` is everything that the bytes depend on besides the key. Raises ExportError when the disk is too
        small, cannot be written to, or another process is at the same work.
        """
        folders: dict[str, _StagedFolder] = {}
        threads = WriteThreads()
        try:
            for key, final in finals.items():
                folders[key] = _StagedFolder(final, _take(final), {**identity, "product": key})
            start = _restore(folders, threads)
            kept = sum(size for staged in folders.values() for size, _ in staged.standing.values())
            for final in finals.values():
                _check_disk(final, needed_bytes - kept)
        except BaseException:
            for staged in folders.values():
                _close(staged, keep=(staged.root / _JOURNAL).is_file())
            threads.shutdown()
            raise
        return cls(folders, start, threads)

    def folder(self, key: str) -> Path:
        """The hidden folder of an artifact, with all in it that was appended.

        For small files beside the streamed ones too; they are written in every run.
        """
        _flush(self._folders[key], wait=True)
        return self._folders[key].folder

    def append(self, key: str, file_name: str, data: Any) -> None:
        """Add bytes (anything with a contiguous buffer) to a file of an artifact."""
        staged = self._folders[key]
        file = staged.files.get(file_name)
        if file is None:
            _flush(staged)  # the file before: it holds memory until then
            file = staged.files[file_name] = HashedFile(files.inside(staged.folder, file_name), self._threads)
        before = file.size
        file.append(data)
        self._unsaved_bytes += file.size - before

    def checkpoint(self, item: int) -> None:
        """Record that `item` items are complete in all files; every RESTART_BYTES also on the disk, meanwhile."""
        for staged in self._folders.values():
            staged.standing = _standing(staged)
        reached = {key: staged.standing for key, staged in self._folders.items()}
        self._reached = (item, reached)  # in one step: a signal may end us between any two
        if self._unsaved_bytes >= RESTART_BYTES:
            self._wait()
            for staged in self._folders.values():
                _flush(staged)
            self._flushed = self._flushing.submit(self._write_down, item, reached)
            self._unsaved_bytes = 0

    def publish(self, key: str, about: Mapping[str, Any] | None = None) -> disk.Published:
        """Give an artifact its final name. `about` goes into its manifest: what it is of.

        An earlier export that stood there goes, one that was changed is set aside; TargetTaken for anything else.
        """
        self._wait()
        staged = self._folders[key]
        before = targets.standing(staged.final, hashes=True)
        _flush(staged)
        known = {name: file.snapshot().result() for name, file in staged.files.items()}
        for file in staged.files.values():
            file.sync()
            file.close()
        published = disk.publish_filled(staged.folder, staged.final, known, {**(about or {}), "kind": "export"}, before)
        _close(self._folders.pop(key), keep=False)
        return published

    def discard(self, key: str) -> None:
        """Give an artifact up and remove what there is of it."""
        self._wait()
        _close(self._folders.pop(key), keep=False)

    def __enter__(self) -> StagedExport:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        # Somebody's folder may be moved away, and what hours have made still takes its place.
        keep = isinstance(error, (StoppedBySignal, KeyboardInterrupt, TargetTaken))
        with suppress(OSError):  # then a later run begins at an older point
            self._wait()
            if keep:
                for staged in self._folders.values():
                    _flush(staged)
                self._write_down(*self._reached)
        for staged in self._folders.values():
            _close(staged, keep)
        self._flushing.shutdown()
        self._threads.shutdown()
        if isinstance(error, OSError) and error.errno in disk.DISK_FULL:
            names = ", ".join(str(staged.final) for staged in self._folders.values())
            raise ExportError(f"{names}: the disk is full", _SMALL_DISK) from error

    def _wait(self) -> None:
        """Wait until the last point is written down. Raises the OSError that prevented it."""
        if self._flushed is not None:
            self._flushed.result()

    def _write_down(self, item: int, reached: Mapping[str, _Standing]) -> None:
        """Make `item` a point from which a later run can go on. What is appended meanwhile does it no harm."""
        under_way = [(self._folders[key], standing) for key, standing in reached.items() if key in self._folders]
        for staged, standing in under_way:
            for name in standing:
                staged.files[name].sync()
        for staged, standing in under_way:
            files = {name: [size, sha256.result()] for name, (size, sha256) in standing.items()}
            staged.points.append({"item": item, "files": files})
            journal = {"identity": dict(staged.identity), "points": staged.points}
            disk.write_atomic(staged.root / _JOURNAL, json.dumps(journal) + "\n")


def _flush(staged: _StagedFolder, wait: bool = False) -> None:
    for file in staged.files.values():
        file.flush()
        if wait:
            file.wait()


def _standing(staged: _StagedFolder) -> _Standing:
    """Where the artifact's files stand now. What has not grown since the last point is not hashed anew."""
    now: _Standing = {}
    for name, file in staged.files.items():
        before = staged.standing.get(name)
        now[name] = before if before and before[0] == file.size else (file.size, file.snapshot())
    return now


def _part_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _take(final: Path) -> FolderLock:
    """The lock on an artifact's hidden folder, which is made where there is none. Raises ExportError."""
    root = _part_of(final)
    while True:
        try:
            check_part(final)
            root.mkdir(parents=True, exist_ok=True)
            taken = lock.acquire(root / _LOCK)
            disk.write_atomic(root / _MARK, json.dumps({"made_by": MADE_BY, "kind": "part"}) + "\n")
        except LockHeld as error:
            what = f"{final}: another process ({error.holder.pid if error.holder else '?'}) is writing it"
            raise ExportError(what, "wait until it is done, or name another folder with `out`") from error
        except FileNotFoundError:  # another process has finished and removed the folder in this moment
            continue
        except (OSError, files.UnsafePathError) as error:  # the latter: a lock with a second name, as backups make
            what = f"{final}: cannot write there ({getattr(error, 'strerror', None) or error})"
            raise ExportError(what, "name another folder with `out`") from error
        for name in (final.name, root.name):  # what a killed process left between two renames
            disk.sweep_leftovers(final.parent, spare_running=True, name=name)
        return taken


def check_part(final: Path) -> None:
    """Whether the hidden folder beside `final` may be used: it is not there, empty, or ours. Raises ExportError."""
    root = _part_of(final)
    if not os.path.lexists(root):
        return
    try:
        ours = _is_part(root)
    except FileNotFoundError:  # another process has finished with it in this moment
        return
    except (OSError, ValueError):  # of files.py and foreign_json.py: links, pipes, no JSON
        ours = False
    if not ours:
        what = f"{root}: is in the way of {final.name}, and was not made by an export"
        raise ExportError(what, "move it away, or name another folder with `out`")


def _is_part(root: Path) -> bool:
    """Raises OSError or ValueError for what cannot be looked at, and links."""
    if files.is_link(root) or not root.is_dir():
        return False
    found = manifest.contents(root)
    if not all(stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) for status in found.values()):
        return False
    names = {name for name in found if "/" not in name and not disk.is_leftover(root / name)}
    if not names <= {_FILES, _LOCK, _JOURNAL, _MARK}:
        return False
    if _MARK in names:
        return bool(foreign_json.checked(_Mark, foreign_json.load(root / _MARK), _MARK))
    if names == {_LOCK} and not found[_LOCK].st_size:
        return True  # killed between the making of its lock and the first word in it: nothing of anybody is in there
    # Up to version 0.5 there was no mark: its lock or its journal tells.
    held = lock.holder_of(root / _LOCK) is not None
    return not names or held or (_JOURNAL in names and bool(_read_journal(root)))


def _read_journal(root: Path) -> _Journal:
    """Raises ForeignFileError."""
    content = foreign_json.load(root / _JOURNAL, _MAX_JOURNAL_BYTES)
    return foreign_json.checked(_Journal, content, str(root / _JOURNAL))


def _restore(folders: Mapping[str, _StagedFolder], threads: WriteThreads) -> int:
    """Bring every artifact to the newest point that all have reached, else to nothing. Returns that point's item."""
    for staged in folders.values():
        staged.points = _read_points(staged)
    shared = set.intersection(*({int(point["item"]) for point in staged.points} for staged in folders.values()))
    start = max(shared, default=0)
    try:
        for staged in folders.values():
            _cut_back(staged, start, threads)
    except (OSError, ValueError, TypeError, KeyError):  # shorter, damaged or not ours: begin anew
        start = 0
        for staged in folders.values():
            _cut_back(staged, start, threads)
    return start


def _read_points(staged: _StagedFolder) -> list[dict[str, Any]]:
    try:
        journal = _read_journal(staged.root)
    except foreign_json.ForeignFileError:
        return []
    return [point.model_dump() for point in journal.points] if journal.identity == staged.identity else []


def _cut_back(staged: _StagedFolder, start: int, threads: WriteThreads) -> None:
    """Leave in the artifact's folder what stood there at the point `start`. Raises OSError or ValueError otherwise."""
    staged.points = [point for point in staged.points if start and point["item"] <= start]
    kept = staged.points[-1]["files"] if start else {}
    staged.files, staged.standing = {}, {}
    if not kept:
        shutil.rmtree(staged.folder, ignore_errors=True)
        (staged.root / _JOURNAL).unlink(missing_ok=True)
    staged.folder.mkdir(exist_ok=True)
    for name, status in manifest.contents(staged.folder).items():
        if not stat.S_ISDIR(status.st_mode) and name not in kept:
            (staged.folder / name).unlink()
    for name, (size, sha256) in kept.items():
        file = HashedFile(files.inside(staged.folder, name), threads)
        if file.resume(size) != sha256:
            raise ValueError(f"{name} is damaged")
        staged.files[name], staged.standing[name] = file, (size, file.snapshot())


def check_disk(finals: Sequence[Path], needed_bytes: int) -> None:
    """Whether `needed_bytes` in all have room beside `finals`, counting what a killed run has left there already.

    Raises ExportError.
    """
    for final in finals:
        check_part(final)
    left = sum(disk.size_of(_part_of(final)) for final in finals)
    _check_disk(finals[0], needed_bytes - left)


def _check_disk(final: Path, needed_bytes: int) -> None:
    free = disk.free_bytes(final.parent)
    if free < needed_bytes + SPARE_BYTES:
        raise ExportError(
            f"{final}: needs {needed_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free", _SMALL_DISK
        )


def _close(staged: _StagedFolder, keep: bool) -> None:
    """Close the artifact's files, and remove its hidden folder or leave it for a later run."""
    for file in staged.files.values():
        file.close()
    if os.name == "nt":  # where nothing can be renamed or removed while it is open
        staged.lock.release()
    if keep:
        staged.lock.file.unlink(missing_ok=True)
    else:
        disk.discard(staged.root)
    staged.lock.release()
