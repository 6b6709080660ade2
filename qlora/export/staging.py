"""Product folders under way: filled in one pass over the weights, kept through a kill, published by one rename each.

Beside each final folder `out` stands a hidden `.out.part` with the files, a lock, and a journal of points from which
writing can go on: how many items (tensors) were complete, how long each file was, and its sha256. Before a point is
written down, its bytes are flushed to the disk. A run that finds a journal of the same work cuts the files back to the
newest point that all products share, hashes what is left, and goes on; a journal of other work is thrown away.

    with StagedExport.open({"hf": out}, identity, needed_bytes) as workshop:
        for number, tensor in enumerate(tensors):
            if number >= workshop.start:
                workshop.append("hf", "model.safetensors", data)
                workshop.checkpoint(number + 1)
        workshop.publish("hf")

Leaving by a signal keeps the hidden folders, any other exception removes them, and so does a full disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora import disk
from qlora.errors import ExportError, StoppedBySignal
from qlora.lock import FolderLock, LockHeld, acquire

# A kill costs at most the writing of this much; each point costs a flush of the disk.
RESTART_BYTES = 1 << 30
SPARE_BYTES = 64 << 20  # configuration, tokenizer, index, manifest

_FILES, _LOCK, _JOURNAL = "files", "lock", "journal.json"
_SMALL_DISK = "free some space, or name another disk with --out"

# Where each file of a product stood at a point: its bytes, and their sha256 (perhaps still being computed).
_Standing = dict[str, tuple[int, "Future[str] | str"]]


@dataclass
class _StagedFolder:
    """One product under way."""

    final: Path
    lock: FolderLock
    identity: Mapping[str, str]
    files: dict[str, disk.HashedFile] = field(default_factory=dict)
    standing: _Standing = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return _part_of(self.final)

    @property
    def folder(self) -> Path:
        return self.root / _FILES


class StagedExport:
    """Product folders under way; see above. Made by `open`, used as a context manager."""

    def __init__(self, benches: dict[str, _StagedFolder], start: int, hashing: ThreadPoolExecutor) -> None:
        self.start = start
        self._benches = benches
        self._hashing = hashing
        self._reached = (start, {key: bench.standing for key, bench in benches.items()})
        self._unsaved_bytes = 0
        self._flushing = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushed: Future[None] | None = None

    @classmethod
    def open(cls, finals: Mapping[str, Path], identity: Mapping[str, str], needed_bytes: int) -> StagedExport:
        """Begin, or go on with, the products `finals` (key to final folder), which need `needed_bytes` in all.

        `identity` is everything that the bytes depend on besides the product's key. Raises ExportError when the disk is
        too small, cannot be written to, or another process is at the same work.
        """
        benches: dict[str, _StagedFolder] = {}
        hashing = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        try:
            for key, final in finals.items():
                benches[key] = _StagedFolder(final, _take(final), {**identity, "product": key})
            start = _restore(benches, hashing)
            kept = sum(size for bench in benches.values() for size, _ in bench.standing.values())
            for final in finals.values():
                _check_disk(final, needed_bytes - kept)
        except BaseException:
            for bench in benches.values():
                _close(bench, keep=(bench.root / _JOURNAL).is_file())
            hashing.shutdown()
            raise
        return cls(benches, start, hashing)

    def folder(self, key: str) -> Path:
        """The hidden folder of a product, for small files beside the streamed ones; they are written in every run."""
        return self._benches[key].folder

    def append(self, key: str, file_name: str, data: Any) -> None:
        """Add bytes (anything with a buffer of single bytes, left unchanged from now on) to a file of a product."""
        bench = self._benches[key]
        file = bench.files.get(file_name)
        if file is None:
            file = bench.files[file_name] = disk.HashedFile(disk.inside(bench.folder, file_name), self._hashing)
        before = file.size
        file.append(data)
        self._unsaved_bytes += file.size - before

    def checkpoint(self, item: int) -> None:
        """Say that `item` items are complete in all files; flushed and written down every RESTART_BYTES, meanwhile."""
        reached = {key: _standing(bench) for key, bench in self._benches.items()}
        for key, bench in self._benches.items():
            bench.standing = reached[key]
        self._reached = (item, reached)  # in one step: a signal may end us between any two
        if self._unsaved_bytes >= RESTART_BYTES:
            self._wait()
            self._flushed = self._flushing.submit(self._write_down, item, reached)
            self._unsaved_bytes = 0

    def publish(self, key: str) -> int:
        """Give a product its final name, replacing what stood there. Returns its bytes."""
        self._wait()
        bench = self._benches[key]
        known = {name: file.snapshot().result() for name, file in bench.files.items()}
        for file in bench.files.values():
            file.close()
        size = disk.publish_filled(bench.folder, bench.final, known)
        _close(self._benches.pop(key), keep=False)
        return size

    def discard(self, key: str) -> None:
        """Give a product up and remove what there is of it."""
        self._wait()
        _close(self._benches.pop(key), keep=False)

    def __enter__(self) -> StagedExport:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        keep = isinstance(error, (StoppedBySignal, KeyboardInterrupt))
        with suppress(OSError):  # then a later run begins at an older point
            self._wait()
            if keep:
                self._write_down(*self._reached)
        for bench in self._benches.values():
            _close(bench, keep)
        self._hashing.shutdown()
        self._flushing.shutdown()
        if isinstance(error, OSError) and error.errno in disk.DISK_FULL:
            names = ", ".join(str(bench.final) for bench in self._benches.values())
            raise ExportError(f"{names}: the disk is full", _SMALL_DISK) from error

    def _wait(self) -> None:
        """Wait until the point that is being written down is. Raises the OSError that kept it from being."""
        if self._flushed is not None:
            self._flushed.result()

    def _write_down(self, item: int, reached: Mapping[str, _Standing]) -> None:
        """Make `item` a point from which a later run can go on. What is appended meanwhile does it no harm."""
        under_way = [(self._benches[key], standing) for key, standing in reached.items() if key in self._benches]
        for bench, standing in under_way:
            for name in standing:
                bench.files[name].sync()
        for bench, standing in under_way:
            files = {name: [size, _value(sha256)] for name, (size, sha256) in standing.items()}
            bench.points.append({"item": item, "files": files})
            journal = {"identity": dict(bench.identity), "points": bench.points}
            disk.write_atomic(bench.root / _JOURNAL, json.dumps(journal) + "\n")


def _standing(bench: _StagedFolder) -> _Standing:
    """Where the product's files stand now. What has not grown since the last point is not hashed anew."""
    now: _Standing = {}
    for name, file in bench.files.items():
        before = bench.standing.get(name)
        now[name] = before if before and before[0] == file.size else (file.size, file.snapshot())
    return now


def _part_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _take(final: Path) -> FolderLock:
    """The lock on a product's hidden folder, which is made where there is none."""
    root = _part_of(final)
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            return acquire(root / _LOCK)
        except LockHeld as held:
            what = f"{final}: another process ({held.holder.pid if held.holder else '?'}) is writing it"
            raise ExportError(what, "wait until it is done, or name another folder with --out") from held
        except FileNotFoundError:  # another process has finished and removed the folder in this moment
            continue
        except OSError as error:
            what = f"{final}: cannot write there ({error.strerror})"
            raise ExportError(what, "name another folder with --out") from error


def _restore(benches: Mapping[str, _StagedFolder], hashing: ThreadPoolExecutor) -> int:
    """Bring every product to the newest point that all have reached, else to nothing. Returns that point's item."""
    for bench in benches.values():
        bench.points = _read_points(bench)
    shared = set.intersection(*({int(point["item"]) for point in bench.points} for bench in benches.values()))
    start = max(shared, default=0)
    try:
        for bench in benches.values():
            bench.points = [point for point in bench.points if start and point["item"] <= start]
            _cut_back(bench, bench.points[-1]["files"] if start else {}, hashing)
    except (OSError, ValueError, TypeError, KeyError):  # shorter, damaged or not ours: begin anew
        start = 0
        for bench in benches.values():
            bench.points = []
            _cut_back(bench, {}, hashing)
    return start


def _read_points(bench: _StagedFolder) -> list[dict[str, Any]]:
    try:
        journal = json.loads((bench.root / _JOURNAL).read_text(encoding="utf-8"))
        points = [point for point in journal["points"] if isinstance(point["item"], int)]
        return points if journal["identity"] == bench.identity else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _cut_back(bench: _StagedFolder, files: Mapping[str, list[Any]], hashing: ThreadPoolExecutor) -> None:
    """Leave in the product's folder these files, of these sizes and sha256. Raises OSError or ValueError otherwise."""
    bench.files, bench.standing = {}, {}
    if not files:
        shutil.rmtree(bench.folder, ignore_errors=True)
        (bench.root / _JOURNAL).unlink(missing_ok=True)
    bench.folder.mkdir(exist_ok=True)
    for path in sorted(bench.folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(bench.folder).as_posix() not in files:
            path.unlink()
    for name, (size, sha256) in files.items():
        file = disk.HashedFile(disk.inside(bench.folder, name), hashing)
        if file.resume(size) != sha256:
            raise ValueError(f"{name} is damaged")
        bench.files[name], bench.standing[name] = file, (size, sha256)


def check_disk(finals: Sequence[Path], needed_bytes: int) -> None:
    """Whether `needed_bytes` in all have room beside `finals`, counting what a killed run has left there already.

    Raises ExportError.
    """
    left = sum(path.stat().st_size for final in finals for path in _part_of(final).rglob("*") if path.is_file())
    _check_disk(finals[0], needed_bytes - left)


def _check_disk(final: Path, needed_bytes: int) -> None:
    free = disk.free_bytes(final.parent)
    if free < needed_bytes + SPARE_BYTES:
        raise ExportError(
            f"{final}: needs {needed_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free", _SMALL_DISK
        )


def _close(bench: _StagedFolder, keep: bool) -> None:
    """Close the product's files, and remove its hidden folder or leave it for a later run."""
    for file in bench.files.values():
        file.close()
    if os.name == "nt":  # where nothing can be renamed or removed while it is open
        bench.lock.release()
    if keep:
        bench.lock.file.unlink(missing_ok=True)
    else:
        disk.remove_folder(bench.root)
    bench.lock.release()


def _value(sha256: Future[str] | str) -> str:
    return sha256 if isinstance(sha256, str) else sha256.result()
