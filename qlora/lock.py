"""One process a folder: a lock that the system releases when the process that took it dies, however it dies.

A run's folder and the hidden folder of an export each have a lock file, which names its holder (process, its start,
machine). Where the file system can lock (all local ones, and NFS), the lock itself decides: a holder that is gone has
lost it. Where it cannot, the holder named in the file counts for as long as a process of that number and start runs on
this machine. `filelock` locks the open file; its own FileLock would neither write nor read a holder.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from filelock import lock_descriptor

from qlora import files, foreign_json

MAX_LOCK_BYTES = 4096
_CANNOT_LOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS)
# On Windows a locked byte cannot be read by others, and byte 0 is the one that filelock locks: a space goes there.
_TEXT_START = 1 if os.name == "nt" else 0


@dataclass(frozen=True)
class Holder:
    """The process that has a lock, as the lock's file names it; `inode` is that file's own (0: not recorded)."""

    pid: int
    started: str
    host: str
    inode: int = 0

    @property
    def runs(self) -> bool:
        """Whether it may still run; on another machine that cannot be seen from here, so yes."""
        return self.host != socket.gethostname() or (self.started != "" and start_of(self.pid) == self.started)


class _Named(foreign_json.ForeignModel):
    pid: int
    started: str
    host: str
    inode: int = 0


class LockHeld(Exception):
    """Another process has the lock: `holder`, None where the file does not name it. The caller words the message."""

    def __init__(self, holder: Holder | None) -> None:
        self.holder = holder
        super().__init__(holder)


class FolderLock:
    """A lock that this process has taken, until `release` or the end of the process."""

    def __init__(self, opened: FileIO, file: Path) -> None:
        self._opened = opened
        self.file = file

    def release(self) -> None:
        """Clear the holder's name, then unlock. The file stays; to remove it, do so before the release."""
        if self._opened.closed:
            return
        with suppress(OSError):
            self._opened.truncate(0)
        self._opened.close()


def acquire(file: Path) -> FolderLock:
    """Take the lock for this process; its file is made where there is none.

    Raises LockHeld, files.UnsafePathError (a link, no plain file), or OSError.
    """
    while True:
        opened = files.open_to_write(file, "update")
        try:
            handle = opened.fileno()
            _take(handle)
            if _is_at(handle, file):
                me = {"pid": os.getpid(), "started": start_of(os.getpid()), "host": socket.gethostname()}
                text = json.dumps({**me, "inode": os.fstat(handle).st_ino})
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, b" " * _TEXT_START + text.encode())
                return FolderLock(opened, file)
        except BaseException:
            opened.close()
            raise
        opened.close()


def check_free(file: Path) -> None:
    """Raises LockHeld when a running process has the lock, UnsafePathError as `acquire` does. Changes nothing."""
    try:
        with files.open_to_write(file, "existing") as opened:
            _take(opened.fileno())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # nobody has ever been here, or none of ours can be: the next check says so


def holder_of(file: Path) -> Holder | None:
    """Whom a lock's file names, whether or not it still runs; None where it names nobody, or is no such file."""
    try:
        with files.open_to_read(file) as opened:
            return _read(opened.fileno())
    except (OSError, files.UnsafePathError):
        return None


def is_held(file: Path) -> bool | None:
    """Whether the lock that this process took by that name is still there, and not another file or somebody else's.

    None where nothing is known: no file, or one that names nobody or cannot be read.
    """
    holder = holder_of(file)
    if holder is None:
        return None
    mine = (holder.pid, holder.started, holder.host) == (os.getpid(), start_of(os.getpid()), socket.gethostname())
    try:
        return mine and holder.inode == os.lstat(file).st_ino
    except OSError:
        return None


def is_running(pid: int) -> bool:
    """Whether a process of that number runs on this machine; True where that cannot be told."""
    if os.name == "nt":  # where os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def start_of(pid: int) -> str:
    """When a process of this machine began, as a text that no other process of that number shares; "" if none runs."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # proc(5): field 22, counted after the name, which stands in brackets and may hold anything
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        has_starts = os.path.isdir("/proc/self") or os.name == "nt"
        return "runs" if not has_starts and is_running(pid) else ""


def _take(handle: int) -> None:
    """Lock the open file. Raises LockHeld."""
    try:
        locked: bool | None = lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        locked = None  # this file system cannot lock
    holder = _read(handle)
    if locked is False or (locked is None and holder is not None and holder.runs):
        raise LockHeld(holder)


def _read(handle: int) -> Holder | None:
    os.lseek(handle, _TEXT_START, os.SEEK_SET)
    try:
        text = foreign_json.parse(os.read(handle, MAX_LOCK_BYTES), "the lock file")
        named = foreign_json.checked(_Named, text, "the lock file")
    except foreign_json.ForeignFileError:
        return None
    return Holder(named.pid, named.started, named.host, named.inode)


def _is_at(handle: int, file: Path) -> bool:
    """Whether the open file still has its name: its last holder may have removed or renamed it before we locked it."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False
