"""One run a folder: a lock that the system takes back when its holder dies, however it dies.

The file `.lock` names who holds it (process, its start, machine). Where the file system can lock (all local ones, and
NFS), the lock itself is what counts: a holder that is gone has lost it. Where it cannot, the holder named in the file
counts for as long as a process of that number and start runs on this machine.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import RunFolderError

LOCK_FILE = ".lock"
MAX_LOCK_BYTES = 4096
_CANNOT_LOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS)
_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class FolderLock:
    """A held lock. Give it back with `release`; a process that dies gives it back by dying."""

    def __init__(self, handle: int, file: Path) -> None:
        self._handle: int | None = handle
        self.file = file

    def release(self) -> None:
        """Forget the holder, then let go. The file stays: removing it would let two processes lock two files."""
        if self._handle is None:
            return
        with suppress(OSError):
            os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None


@dataclass(frozen=True)
class _Holder:
    pid: int
    started: str
    host: str

    @property
    def runs(self) -> bool:
        """Whether it may still run. On another machine nobody can tell from here: then yes."""
        return self.host != socket.gethostname() or (self.started != "" and start_of(self.pid) == self.started)


def acquire(folder: Path) -> FolderLock:
    """Take the folder for this process. Raises RunFolderError when a running process has it."""
    file = folder / LOCK_FILE
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        locked = _lock(handle)
        holder = _read(handle)
        if locked is False or (locked is None and holder is not None and holder.runs):
            raise _taken(folder, holder)
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps(_me()).encode())
    except BaseException:
        os.close(handle)
        raise
    return FolderLock(handle, file)


def check_free(folder: Path) -> None:
    """Raises RunFolderError when a running process has the folder. Changes nothing."""
    file = folder / LOCK_FILE
    try:
        handle = os.open(file, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # no run has ever been here, or none of ours can be: the next check says so
    try:
        locked = _lock(handle)
        holder = _read(handle)
        if locked is False or (locked is None and holder is not None and holder.runs):
            raise _taken(folder, holder)
    finally:
        os.close(handle)


def start_of(pid: int) -> str:
    """When a process of this machine began, as a text that no other process of that number shares; "" if none runs."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # proc(5): field 22, counted after the name, which stands in brackets and may hold anything
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return _runs_without_proc(pid)


def _runs_without_proc(pid: int) -> str:
    if os.path.isdir("/proc/self") or os.name == "nt":
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "runs"
    return "runs"


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "started": start_of(os.getpid()), "host": socket.gethostname()}


def _read(handle: int) -> _Holder | None:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        said = json.loads(os.read(handle, MAX_LOCK_BYTES))
        return _Holder(int(said["pid"]), str(said["started"]), str(said["host"]))
    except (ValueError, KeyError, TypeError):
        return None


def _lock(handle: int) -> bool | None:
    """True: locked; False: another process has it; None: this file system cannot lock."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, MAX_LOCK_BYTES, os.SEEK_SET)  # a byte after the text, which others must be able to read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _CANNOT_LOCK:
            return None
        raise
    return True


def _taken(folder: Path, holder: _Holder | None) -> RunFolderError:
    who = f"process {holder.pid} on {holder.host}" if holder else "another process"
    return RunFolderError(
        f"{folder}: a run is under way in it ({who})",
        "wait for it or stop it; a run that died holds no lock, and on a disk that cannot lock, remove .lock",
    )
