"""The only code that renames, fsyncs and removes.

A folder is published by one rename: it is written under a hidden name beside its final one, every file is
flushed to the disk, a manifest with the sha256 of each file is written last, and only then does the final name
appear. A reader therefore sees the whole folder or none of it, whenever the process dies. (Written in place, the
newest checkpoint was unloadable after 29 of 30 random kills; published this way, after 0 of 30.)

What it replaces is removed only where it is ours and as it was (`manifest.standing`), else it keeps its bytes under
another name. Nothing is written or removed through a link: that is an OSError with the link's name.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from qlora import files, lock, manifest
from qlora.errors import RunFolderError
from qlora.manifest import MANIFEST as MANIFEST
from qlora.manifest import Standing
from qlora.manifest import sha256_file as sha256_file
from qlora.manifest import sha256_text as sha256_text
from qlora.version import __version__

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: more than a file system or a limit lets one file be
_NOT_WRITABLE = "name another folder in output.dir, or give yourself write access to this one"
_NAME_BYTES = 200  # of the 255 that file systems take: process and number stand behind it
# Names that only we give: `tmp` is being written, `swap` gives way to its successor, `old` is being removed.
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|swap|old)-qlora-(?P<pid>[0-9]{1,10})-[0-9a-f]{8}", re.DOTALL)
# Up to version 0.5 they were plainer, and somebody's `.notes.tmp-1` is one of them: only these are surely ours.
_EARLIER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old-swap|old)-(?P<pid>[0-9]{1,10})", re.DOTALL)
_EARLIER_NAMES = re.compile(
    r"recipe\.toml|events\.jsonl|adapter|step-[0-9]{6,}|[0-9a-f]{32}|write-test|memory-calibration\.json"
)


class SetAside(NamedTuple):
    """What was in the way and is not ours to remove: where it lies now, and its size."""

    folder: Path
    bytes: int


class Published(NamedTuple):
    """The bytes of a published folder, and what had to be set aside for it."""

    bytes: int
    aside: SetAside | None


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds `path` (or its nearest existing parent)."""
    return shutil.disk_usage(_nearest(path.resolve())).free


def cache_dir() -> Path:
    """Where token caches live: QLORA_CACHE, else `qlora` in the user's cache folder. UserError without a home."""
    if named := os.environ.get("QLORA_CACHE"):
        return files.user_path(named, "QLORA_CACHE")
    if os.name == "nt":
        return files.user_path(os.environ.get("LOCALAPPDATA") or "~", "LOCALAPPDATA") / "qlora" / "cache"
    return files.user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "the cache (set QLORA_CACHE)") / "qlora"


def make_folder(path: Path) -> None:
    """Create a folder with its parents. Raises RunFolderError when it can't be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = hidden(path / "write-test", "tmp")  # swept like every leftover
        files.open_to_write(probe, "new").close()
        probe.unlink()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot write here ({error.strerror or error})", _NOT_WRITABLE) from error


def check_writable(path: Path) -> None:
    """Whether `path`, or the nearest folder above it that exists, can be written to. Raises RunFolderError."""
    place = _nearest(path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunFolderError(f"{path}: cannot write here ({place} is read-only for you)", _NOT_WRITABLE)


def _nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next((place for place in (path, *path.parents) if place.exists()), path)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 for what cannot be looked at."""
    try:
        return sum(status.st_size for status in manifest.contents(folder).values() if stat.S_ISREG(status.st_mode))
    except OSError:
        return 0


def open_to_write(path: Path, way: files.WayToWrite, permissions: int = 0o644) -> FileIO:
    """`files.open_to_write`, with OSError for links too: for what is written far from any door."""
    try:
        return files.open_to_write(path, way, permissions)
    except files.UnsafePathError as error:
        raise OSError(errno.ELOOP, str(error)) from error


def write_atomic(path: Path, text: str, permissions: int = 0o644) -> None:
    """Replace a file's content in one rename: a reader sees the old bytes or the new ones. Its folder must be there."""
    temporary = hidden(path, "tmp")
    try:
        with open_to_write(temporary, "new", permissions) as file:
            files.write_all(file, text.encode())
        put_in_place(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def put_in_place(written: Path, final: Path) -> None:
    """Give a file that is written and closed the name `final`, beside it, in one rename."""
    _refuse_link(final)
    with open_to_write(written, "existing") as file:
        _settle(file)
    os.replace(written, final)
    _sync_folder(final.parent)


def publish_folder(final: Path, write: Callable[[Path], None], about: Mapping[str, Any] | None = None) -> Published:
    """Have `write` fill a hidden folder, then give it the name `final` in one rename.

    Whatever goes wrong before the rename leaves what stood there as it was and no temporary folder. The folder above
    `final` is made, those above that are not: what holds a run may be gone. See `publish_filled` for the rest.
    """
    final.parent.mkdir(exist_ok=True)
    _refuse_link(final.parent)
    temporary = hidden(final, "tmp")
    temporary.mkdir()
    try:
        write(temporary)
        return publish_filled(temporary, final, {}, about)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_filled(
    filled: Path,
    final: Path,
    known: Mapping[str, str],
    about: Mapping[str, Any] | None = None,
    before: Standing | None = None,
) -> Published:
    """Give the folder `filled` the name `final` in one rename, with its manifest in it.

    Both are on one file system. `known` is the sha256 of files that were hashed while they were written: these are not
    read again. `about` goes into the manifest: the folder's `kind`, and what it is `of`. What stands at `final` is
    removed when the new folder stands, if it is ours and unchanged, and else set aside as `final.N`; `before` is its
    standing, all hashes read, where the caller knows that already.
    """
    entries: dict[str, dict[str, Any]] = {}
    found = manifest.contents(filled)
    for name in sorted(name for name, status in found.items() if not stat.S_ISDIR(status.st_mode)):
        with open_to_write(filled / name, "existing") as file:
            _settle(file)
            size = os.fstat(file.fileno()).st_size
        if name != MANIFEST:
            entries[name] = {"sha256": known.get(name) or sha256_file(filled / name), "bytes": size}
    facts = {**(about or {}), "made_by": manifest.MADE_BY, "version": __version__, "files": entries}
    write_atomic(filled / MANIFEST, manifest.sealed(facts))
    for folder in (filled, *(filled / name for name, status in found.items() if stat.S_ISDIR(status.st_mode))):
        _sync_folder(folder, close_to_others=True)
    aside = _swap_in(filled, final, before or manifest.standing(final, hashes=True))
    return Published(sum(int(entry["bytes"]) for entry in entries.values()), aside)


def verify_folder(folder: Path) -> str | None:
    """None when every file of the manifest is there with its size and sha256, else what is wrong."""
    return manifest.verify(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A published folder's manifest, not verified. Raises ValueError."""
    return manifest.read(folder)


def set_aside(folder: Path, suffix: str) -> Path:
    """Rename a folder to the first free one of `<name><suffix>1`, `<name><suffix>2`, … Returns the new path."""
    return _set_aside(folder, folder, suffix)


def _set_aside(folder: Path, name: Path, suffix: str) -> Path:
    """Rename `folder` to the first free one of the names that `set_aside` would give `name`."""
    _refuse_link(folder)
    number = 1
    while os.path.lexists(target := name.with_name(f"{name.name}{suffix}{number}")):
        number += 1
    os.rename(folder, target)
    _sync_folder(folder.parent)
    return target


def remove_folder(folder: Path) -> None:
    """Remove a published folder, unless something was changed or added in it: then it stays.

    It leaves its name in one rename first, so that no half of it is ever seen.
    """
    if manifest.standing(folder, hashes=False).whose == "ours":
        discard(folder)


def discard(folder: Path) -> bool:
    """Remove a folder that the caller knows to be ours, whatever is in it; out of its name in one rename first.

    Returns whether all of it is gone; what could not be removed lies under a hidden name, which is swept later.
    """
    _refuse_link(folder)
    doomed = hidden(folder, "old")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    return not os.path.lexists(doomed)


def sweep_leftovers(parent: Path, spare_running: bool = False, name: str | None = None) -> int:
    """Remove the hidden folders and files that a killed process of ours left. Returns how many.

    `spare_running` leaves those of processes that run: for a folder that several may use at once. `name`: only what
    belongs to the folder of that name. Names alone do not make them ours: see `_HIDDEN` and `_EARLIER`.

    A process may have died between the two renames that replace a folder, so that neither the old one nor the new one
    has its name: then the new one, if it is whole, or else the old one gets it.
    """
    leftovers = [leftover for leftover in _leftovers(parent) if name in (None, leftover.name)]
    if spare_running:
        leftovers = [leftover for leftover in leftovers if not lock.is_running(leftover.pid)]
    gone = _finish_swaps(parent, leftovers)
    for leftover in leftovers:
        path = leftover.path
        if path in gone:
            continue
        if leftover.kind == "swap" and manifest.standing(path, hashes=True).whose != "ours":
            _set_aside(path, parent / leftover.name, ".")  # somebody wrote in it while it was replaced
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers) - len(gone)


class Leftover(NamedTuple):
    """What a killed process left: `kind` is tmp, swap or old, `earlier` a name of a version up to 0.5."""

    path: Path
    name: str
    kind: str
    pid: int
    earlier: bool


def is_leftover(path: Path) -> bool:
    """Whether `sweep_leftovers` would take it for something that a killed process of ours left."""
    return leftover_at(path) is not None


def _leftovers(parent: Path) -> list[Leftover]:
    paths = sorted(parent.glob(".*")) if parent.is_dir() else []
    return [leftover for path in paths if (leftover := leftover_at(path))]


def leftover_at(path: Path) -> Leftover | None:
    """A hidden file or folder that is surely ours, no link."""
    match = now = _HIDDEN.fullmatch(path.name)
    if match is None and (earlier := _EARLIER.fullmatch(path.name)):
        known = _EARLIER_NAMES.fullmatch(earlier["name"]) is not None
        match = earlier if known or manifest.standing(path, hashes=True).whose == "ours" else None
    if match is None or files.is_link(path) or not (path.is_dir() or path.is_file()):
        return None
    return Leftover(path, match["name"], match["kind"].replace("old-swap", "swap"), int(match["pid"]), now is None)


def _finish_swaps(parent: Path, leftovers: list[Leftover]) -> set[Path]:
    """Give back their names to folders that lost them between two renames. Returns what was renamed."""
    gone: set[Path] = set()
    for name in {leftover.name for leftover in leftovers if leftover.kind == "swap"}:
        final = parent / name
        # A whole new one is better than the old one; of the old one, nothing may be lost.
        new = [
            one.path for one in leftovers if one.name == name and one.kind == "tmp" and verify_folder(one.path) is None
        ]
        old = [one.path for one in leftovers if one.name == name and one.kind == "swap"]
        if not os.path.lexists(final):
            os.rename((chosen := [*new, *old][0]), final)
            _sync_folder(parent)
            gone.add(chosen)
    return gone


def _swap_in(temporary: Path, final: Path, before: Standing) -> SetAside | None:
    """Give `temporary` the name `final`, where `before` stands. Returns what was set aside for it."""
    _refuse_link(final)
    if before.whose == "nobody":
        if final.exists():
            final.rmdir()  # fails where something has been put into it since
        os.rename(temporary, final)
        _sync_folder(final.parent)
        return None
    if before.whose == "ours":
        old = hidden(final, "swap")
        os.rename(final, old)
    else:
        old = set_aside(final, ".")
    try:
        os.rename(temporary, final)
    except BaseException:
        if not os.path.lexists(final):
            os.rename(old, final)
        raise
    _sync_folder(final.parent)
    if before.whose == "ours":
        if manifest.stamp_of(manifest.contents(old)) == before.stamp:
            discard(old)
            return None
        old = _set_aside(old, final, ".")  # written to after it was looked at
    return SetAside(old, size_of(old))


def hidden(path: Path, kind: str) -> Path:
    """A new name beside `path` that tells what it is for, and by which process; nobody else has one like it.

    Of a long name only what gives way to its successor needs all: it may have to get it back.
    """
    name = path.name
    if match := _HIDDEN.fullmatch(name):
        name = match["name"]
    if kind != "swap":
        name = name.encode("utf-8", "surrogateescape")[:_NAME_BYTES].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{kind}-qlora-{os.getpid()}-{secrets.token_hex(4)}")


def _refuse_link(path: Path) -> None:
    if files.is_link(path):
        raise OSError(errno.ELOOP, "it is a link, and nothing is written or removed through one", str(path))


def _settle(file: FileIO) -> None:
    """Flush a file to the disk; nobody else may write to it, whatever the umask: it becomes 0644 or 0600."""
    _close_to_others(file.fileno())
    os.fsync(file.fileno())


def _close_to_others(handle: int) -> None:
    mode = os.fstat(handle).st_mode
    if mode & 0o022 and os.name != "nt":
        os.fchmod(handle, mode & 0o7755)


def _sync_folder(folder: Path, close_to_others: bool = False) -> None:
    """Flush a folder's list of names, and perhaps take others' right to write from it (0755 or 0700).

    Windows has no such call, and some network disks refuse it.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (os.O_NOFOLLOW if close_to_others else 0))
    try:
        if close_to_others:
            _close_to_others(handle)
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
