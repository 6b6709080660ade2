"""One process a folder: a lock that the system takes back when its holder dies, however it dies.

A run's folder and the hidden folder of an export each have a lock file, which names who holds it (process, its start,
machine). Where the file system can lock (all local ones, and NFS), the lock itself is what counts: a holder that is
gone has lost it. Where it cannot, the holder named in the file counts for as long as a process of that number and start
runs on this machine.
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

MAX_LOCK_BYTES = 4096
_CANNOT_LOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS)
_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file tells."""

    pid: int
    started: str
    host: str

    @property
    def runs(self) -> bool:
        """Whether it may still run. On another machine nobody can tell from here: then yes."""
        return self.host != socket.gethostname() or (self.started != "" and start_of(self.pid) == self.started)


class LockHeld(Exception):
    """Another process has the lock: `holder`, None where the file does not tell. Whoever asked puts it into words."""

    def __init__(self, holder: Holder | None) -> None:
        self.holder = holder
        super().__init__(holder)


class FolderLock:
    """A held lock. Give it back with `release`; a process that dies gives it back by dying."""

    def __init__(self, handle: int, file: Path) -> None:
        self._handle: int | None = handle
        self.file = file

    def release(self) -> None:
        """Forget the holder, then let go. The file stays; whoever wants it gone removes it while it is held."""
        if self._handle is None:
            return
        with suppress(OSError):
            os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None


def acquire(file: Path) -> FolderLock:
    """Take the lock for this process; its file is made where there is none. Raises LockHeld, or OSError."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(handle)
            if _is_at(handle, file):
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, json.dumps(_me()).encode())
                return FolderLock(handle, file)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def check_free(file: Path) -> None:
    """Raises LockHeld when a running process has the lock. Changes nothing."""
    try:
        handle = os.open(file, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # nobody has ever been here, or none of ours can be: the next check says so
    try:
        _take(handle)
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


def _take(handle: int) -> None:
    """Lock the open file. Raises LockHeld."""
    locked = _lock(handle)
    holder = _read(handle)
    if locked is False or (locked is None and holder is not None and holder.runs):
        raise LockHeld(holder)


def _is_at(handle: int, file: Path) -> bool:
    """Whether the open file still has its name: its last holder may have removed or renamed it before we locked it."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "started": start_of(os.getpid()), "host": socket.gethostname()}


def _read(handle: int) -> Holder | None:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        said = json.loads(os.read(handle, MAX_LOCK_BYTES))
        return Holder(int(said["pid"]), str(said["started"]), str(said["host"]))
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
