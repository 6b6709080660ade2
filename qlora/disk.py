"""The only code that renames, fsyncs, hashes, or joins an untrusted name to a folder.

A folder is published by one rename: it is written under a hidden name beside its final one, every file is
flushed to the disk, a manifest with the sha256 of each file is written last, and only then does the final name
appear. A reader therefore sees the whole folder or none of it, whenever the process dies. (Written in place, the
newest checkpoint was unloadable after 29 of 30 random kills; published this way, after 0 of 30.)
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from qlora import files, foreign_json, lock
from qlora.errors import RunFolderError, foreign_failures

MANIFEST = "manifest.json"
_SELF = "sha256"  # of the manifest itself
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: more than a file system or a limit lets one file be
_NOT_WRITABLE = "name another folder in output.dir, or give yourself write access to this one"
_SWAPPED = ".old-swap-"  # a folder that its successor replaces; `.old-` alone is one that is being removed


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """Hex sha256 of strings, each ended by a NUL so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def inside(root: Path, name: str) -> Path:
    """`root / name`, if that is a plain path that stays inside `root`; for names that come from a file.

    Raises ValueError for absolute names, `..`, NUL, a link that leaves the folder, and whatever is no regular
    file or folder (a pipe would block, a device would never end).
    """
    if not name or "\0" in name or os.path.isabs(name) or "\\" in name:
        raise ValueError(f"{name!r} is not a relative file name")
    if ".." in Path(name).parts:
        raise ValueError(f"{name!r} leaves the folder {root}")
    path = root / name
    # A hub snapshot is a folder of links into the blobs of the same repository, two levels up.
    home = root.resolve()
    allowed = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    real = path.resolve()
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(f"{name!r} is a link out of the folder {root}")
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise ValueError(f"{name!r} is neither a file nor a folder")
    return path


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
        probe = path / f".write-test.tmp-{os.getpid()}"  # swept like every leftover
        probe.touch()
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


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content in one rename: a reader sees the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(text.encode())
        _sync_file(temporary)
        _close_to_others(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def put_in_place(written: Path, final: Path) -> None:
    """Give a file that is written and closed the name `final`, beside it, in one rename."""
    _sync_file(written)
    _close_to_others(written)
    os.replace(written, final)
    _sync_folder(final.parent)


def publish_folder(final: Path, write: Callable[[Path], None], about: Mapping[str, Any] | None = None) -> int:
    """Have `write` fill a hidden folder, then give it the name `final` in one rename. Returns its bytes.

    An existing folder of that name is replaced: it is moved aside, and removed once the new one stands. Whatever
    goes wrong before the rename leaves the old folder as it was and no temporary one. `about` goes into the manifest.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        return publish_filled(temporary, final, {}, about)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_filled(filled: Path, final: Path, known: Mapping[str, str], about: Mapping[str, Any] | None = None) -> int:
    """Give the folder `filled` the name `final` in one rename, with its manifest in it. Returns its bytes.

    Both are on one file system. `known` is the sha256 of files that were hashed while they were written: these are not
    read again. `about` goes into the manifest.
    """
    manifest: dict[str, Any] = {**(about or {}), "files": {}}
    for path in sorted(path for path in filled.rglob("*") if path.is_file()):
        _close_to_others(path)
        _sync_file(path)
        name = path.relative_to(filled).as_posix()
        manifest["files"][name] = {"sha256": known.get(name) or sha256_file(path), "bytes": path.stat().st_size}
    manifest[_SELF] = _sha256_of(manifest)
    # No newline at its end: a manifest that lacks its last byte must not be a manifest.
    write_atomic(filled / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    for folder in (filled, *(path for path in filled.rglob("*") if path.is_dir())):
        _close_to_others(folder)
        _sync_folder(folder)
    _swap_in(filled, final)
    return sum(int(entry["bytes"]) for entry in manifest["files"].values())


class HashedFile:
    """A file written from front to back whose sha256 runs along, in a thread of `hashing`, while it is written.

    `size` is what has been appended; nothing is open while nothing is written.
    """

    def __init__(self, path: Path, hashing: Executor) -> None:
        self.path = path
        self.size = 0
        self._hashing = hashing
        self._digest = hashlib.sha256()
        self._hashed: Future[None] | None = None
        self._file: Any = None

    def resume(self, size: int) -> str:
        """Go on behind the first `size` bytes of the file that is there; the rest is cut off. Returns their sha256.

        Raises OSError where there are fewer.
        """
        with self.path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) < size:
                raise OSError(errno.EIO, f"{self.path} is shorter than {size} bytes")
            file.truncate(size)
            file.seek(0)
            self._digest = hashlib.file_digest(file, "sha256")
        self.size = size
        return self._digest.hexdigest()

    def append(self, data: Any) -> None:
        """Write the bytes of `data`: a contiguous buffer, which the caller does not change afterwards."""
        view = memoryview(data)
        if not view.nbytes:
            return
        left = view.cast("B")
        if self._file is None:
            self._file = self.path.open("r+b" if self.size else "wb", buffering=0)
            self._file.seek(self.size)
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._hashing.submit(self._digest.update, left)
        while left:
            written = self._file.write(left)
            left = left[written:]
            self.size += written

    def snapshot(self) -> Future[str]:
        """The sha256 of what has been appended up to now, once it is hashed."""
        return self._hashing.submit(lambda: self._digest.copy().hexdigest())

    def sync(self) -> None:
        """Flush what has been appended to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def verify_folder(folder: Path) -> str | None:
    """None when every file of the manifest is there with its size and sha256, else what is wrong."""
    with foreign_failures() as failure:
        manifest = read_manifest(folder)
        entries = manifest["files"]
        if manifest.pop(_SELF) != _sha256_of(manifest):
            return f"{MANIFEST} is damaged (its own sha256 differs)"
        for name, entry in entries.items():
            path = inside(folder, name)
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_file(path) != entry["sha256"]:
                return f"{name} is damaged (its sha256 differs from the manifest's)"
    return f"the manifest cannot be read ({failure.error})" if failure.error else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A published folder's manifest, not verified. Raises OSError or ValueError."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("it holds no JSON object")
    return manifest


class _Entry(foreign_json.ForeignModel):
    sha256: str
    bytes: int


class _Manifest(foreign_json.ForeignModel):
    files: dict[str, _Entry]
    sha256: str


def recorded_sha256(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a published folder, as its manifest records them; the files are not looked at.

    Raises FileNotFoundError where there is no manifest, ValueError for one that is damaged or none of ours.
    """
    file = files.inside(folder, MANIFEST)
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, f"there is no {MANIFEST}", str(file))
    content = foreign_json.load_object(file)
    entries = foreign_json.checked(_Manifest, content, str(file)).files
    if content.pop(_SELF) != _sha256_of(content):
        raise ValueError(f"{MANIFEST} is damaged (its own sha256 differs)")
    return {name: entry.sha256 for name, entry in entries.items()}


def _sha256_of(manifest: Mapping[str, Any]) -> str:
    """Of everything in a manifest but this hash itself: versions and names are protected like the files are."""
    return sha256_text(json.dumps(manifest, sort_keys=True))


def set_aside(folder: Path, suffix: str) -> Path:
    """Rename a folder to the first free one of `<name><suffix>1`, `<name><suffix>2`, … Returns the new path."""
    number = 1
    while (target := folder.with_name(f"{folder.name}{suffix}{number}")).exists():
        number += 1
    os.rename(folder, target)
    _sync_folder(folder.parent)
    return target


def remove_folder(folder: Path) -> None:
    """Remove a published folder: first out of its name in one rename, so that no half of it is ever seen."""
    doomed = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep_leftovers(parent: Path, spare_running: bool = False) -> int:
    """Remove hidden `.tmp-` and `.old-` folders and files that a killed process left. Returns how many.

    `spare_running` leaves those of processes that run: for a folder that several may use at once.

    A process may have died between the two renames that replace a folder, so that neither the old one nor the new one
    has its name: then the new one, if it is whole, or else the old one gets it.
    """
    _finish_swaps(parent)
    leftovers = [path for path in parent.glob(".*") if ".tmp-" in path.name or ".old-" in path.name]
    if spare_running:
        numbers = {path: path.name.rpartition("-")[2] for path in leftovers}
        leftovers = [path for path, pid in numbers.items() if pid.isdecimal() and not lock.is_running(int(pid))]
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


def _finish_swaps(parent: Path) -> None:
    for mark in (".tmp-", _SWAPPED):  # a whole new one is better than the old one
        for path in sorted(parent.glob(f".*{mark}*")):
            final = parent / path.name[1:].partition(mark)[0]
            replaced = any(parent.glob(f".{glob.escape(final.name)}{_SWAPPED}*"))
            if path.is_dir() and replaced and not final.exists() and verify_folder(path) is None:
                os.rename(path, final)
                _sync_folder(parent)


def _swap_in(temporary: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}{_SWAPPED}{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except BaseException:
        if old.exists() and not final.exists():
            os.rename(old, final)
        raise
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _close_to_others(path: Path) -> None:
    """Nobody else may write to it, whatever the umask: files become 0644 or 0600, folders 0755 or 0700."""
    mode = path.stat().st_mode
    if mode & 0o022 and os.name != "nt":
        path.chmod(mode & 0o7755)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names. Windows has no such call, and some network disks refuse it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
