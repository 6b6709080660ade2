"""The one place that opens a path which came from outside: one function to read, one to write.

A path that the user names may be a link; it is resolved once (`user_path`). Below it, a link is followed only to where
it stays in that folder, or in the blobs of the same hub repository (`inside`), and what is opened is the resolved path,
without following anything more. What we write never goes through a link. Where the system has no O_NOFOLLOW (Windows,
whose junctions are links too), lstat before and fstat after decide.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Literal

from qlora.errors import UserError

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# A pipe would keep whoever opens it waiting; opened without waiting, it is seen for what it is and refused.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_WAYS_TO_WRITE = {
    "new": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "replace": os.O_WRONLY | os.O_CREAT,  # emptied once it is known to be a file of ours
    "append": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "update": os.O_RDWR | os.O_CREAT,
    "existing": os.O_RDWR,
}
_MODES = {"new": "w", "replace": "w", "append": "a", "update": "r+", "existing": "r+"}
WayToWrite = Literal["new", "replace", "append", "update", "existing"]


class UnsafePathError(ValueError):
    """A path that is not what its name promises: a link out of its folder, a pipe, a device, no plain name."""


def user_path(text: str | os.PathLike[str], what: str = "the path") -> Path:
    """A path that the user names, absolute, with `~` and its links resolved. `what` names it in errors ("`out`").

    Raises UserError for a NUL, a home that does not exist (`~nobody`), a circle of links, and for bytes that are no
    UTF-8: TOML, JSON and the libraries written in Rust cannot name such a file.
    """
    name = os.fspath(text)
    if "\0" in name:
        raise UserError(f"{what}: {name!r} holds a NUL character", "give a plain path")
    try:
        path = Path(name).expanduser().resolve()
        str(path).encode()
        if _is_circle(path):
            raise RuntimeError("Symlink loop")  # as Python itself said until 3.13
        return path
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: {name} has a name that is not UTF-8", "rename it, or use another place") from error
    except RuntimeError as error:  # no such home, or a circle of links
        reason, hint = "there is no such home folder", "write the path out, without ~"
        if "loop" in str(error).lower():
            reason, hint = "its links lead in a circle", "name the file itself, or make the link anew"
        raise UserError(f"{what}: {name}: {reason}", hint) from error
    except OSError as error:
        raise UserError(f"{what}: {name}: {error.strerror or error}", "give another path") from error


def inside(root: Path, name: str) -> Path:
    """The resolved path of `name` (a file or folder that may not exist yet) in the folder `root`.

    For names that come from a file or a listing. Raises UnsafePathError for absolute names, `..`, NUL, a link that ends
    elsewhere than in `root` (or in the blobs of the same hub repository, for a snapshot), and whatever is neither a
    file nor a folder.
    """
    if not name or "\0" in name or os.path.isabs(name) or "\\" in name or Path(name).drive:
        raise UnsafePathError(f"{name!r} is not a relative file name")
    if ".." in Path(name).parts:
        raise UnsafePathError(f"{name!r} leaves the folder {root}")
    try:
        home, real = root.resolve(), (root / name).resolve()
        if _is_circle(real):
            raise RuntimeError("Symlink loop")
    except (OSError, RuntimeError) as error:
        raise UnsafePathError(f"{name!r} is a link that leads nowhere") from error
    # A hub snapshot is a folder of links into the blobs of the same repository, two levels up.
    allowed = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    if not any(real.is_relative_to(place) for place in allowed):
        raise UnsafePathError(f"{name!r} is a link out of the folder {root}")
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        return real
    except OSError as error:
        raise UnsafePathError(f"{name!r} cannot be looked at ({error.strerror})") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UnsafePathError(f"{name!r} is neither a file nor a folder")
    return real


def _is_circle(resolved: Path) -> bool:
    """Whether links lead in a circle, which Python has left as they are from 3.13 on (`Path.resolve`)."""
    try:
        os.stat(resolved)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def unreachable(path: Path) -> str | None:
    """Why the system will not even look at a path (a name that is too long, a folder closed to us); else None."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror or str(error)
    return None


def is_link(path: Path) -> bool:
    """Whether the path itself is a link or, under Windows, a junction; False where there is nothing."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    reparse = getattr(stat, "FILE_ATTRIBUTE_REPARSE_POINT", 0)
    return stat.S_ISLNK(status.st_mode) or bool(getattr(status, "st_file_attributes", 0) & reparse)


def refuse_links(root: Path, path: Path) -> None:
    """Raises UnsafePathError when `path`, or a folder between it and `root`, is a link. `root` itself may be one."""
    place = path
    while place not in (root, place.parent):
        if is_link(place):
            raise UnsafePathError(f"{place} is a link, and nothing is written or removed through one")
        place = place.parent


def open_to_read(path: Path, max_bytes: int | None = None) -> BufferedReader:
    """A regular file, opened to be read; `path` is resolved already. Buffered.

    Raises UnsafePathError for a link, a pipe, a device, a folder or more than `max_bytes`; OSError as open does.
    """
    file = _file_at(path, os.O_RDONLY | _NO_WAIT, "r")
    try:
        size = _regular(file.fileno(), path).st_size
        if max_bytes is not None and size > max_bytes:
            raise UnsafePathError(f"{path}: {size:,} bytes are too many for a file of its kind (at most {max_bytes:,})")
        return BufferedReader(file)
    except BaseException:
        file.close()
        raise


def state_of(file: BufferedReader) -> tuple[int, ...]:
    """What an open file is known again by: size, and when its bytes and its place were changed.

    Not by its number: a drive of the network may give another one at each opening.
    """
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """All of a regular file of at most `max_bytes`. Raises as `open_to_read` does."""
    with open_to_read(path, max_bytes) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnsafePathError(f"{path}: has grown beyond {max_bytes:,} bytes")
    return data


def open_to_write(path: Path, way: WayToWrite, permissions: int = 0o644) -> FileIO:
    """A regular file of our own, opened to be written, unbuffered, never through a link.

    "new" fails where something of that name is; "replace" empties, "append" goes on, "update" reads and writes what is
    there, and so does "existing", which makes no file. Raises UnsafePathError for a link, a second name of another file
    (a hard link), and what is no regular file; OSError as open does.
    """
    file = _file_at(path, _WAYS_TO_WRITE[way] | _NO_WAIT, _MODES[way], permissions)
    try:
        if _regular(file.fileno(), path).st_nlink > 1:
            raise UnsafePathError(f"{path} is a second name of another file, and nothing is written through one")
        if way == "replace":
            os.ftruncate(file.fileno(), 0)
        return file
    except BaseException:
        file.close()
        raise


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of `data` to a file that is not buffered: one call may take a part of it, on a disk that fills up."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def distrust(*places: Path) -> str | None:
    """Why a folder and what lies in it is not to be believed; None where nobody but us and root can write to it.

    `places` are folders from the root down, the last one with its files; what does not exist is no reason.
    """
    if not hasattr(os, "geteuid"):
        return None  # Windows keeps a user's own folders for that user
    for place in (*places, *(sorted(places[-1].iterdir()) if places[-1].is_dir() else ())):
        try:
            status = os.lstat(place)
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(status.st_mode):
            return f"{place} is a link"
        if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
            return f"{place} is neither a file nor a folder"
        if status.st_uid not in (os.geteuid(), 0):
            return f"{place} belongs to another user (number {status.st_uid})"
        if status.st_mode & 0o002 or (status.st_mode & 0o020 and not _is_private(status.st_gid)):
            return f"{place} can be written by others (chmod go-w makes it yours)"
    return None


def _is_private(group: int) -> bool:
    """Whether it is the group that many systems give each user alone: of the user's name, and without other members."""
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:  # a number without a name
        return False
    return entry.gr_name == user.pw_name and group == user.pw_gid and not set(entry.gr_mem) - {user.pw_name}


def _file_at(path: Path, flags: int, mode: str, permissions: int = 0o600) -> FileIO:
    """What `_open` opens, as the file that alone owns its number: where Ctrl-C ends what opens it, it is closed once. A
    number that is closed a second time may be another thread's file by then."""
    try:
        return FileIO(path, mode, opener=lambda *_: _open(path, flags, permissions))
    except IsADirectoryError as error:
        raise UnsafePathError(f"{path} is not a regular file") from error


def _open(path: Path, flags: int, permissions: int) -> int:
    before = None
    if not _NO_FOLLOW:
        if is_link(path):
            raise UnsafePathError(f"{path} is a link")
        before = os.lstat(path) if path.exists() else None
    try:
        handle = os.open(path, flags | _NO_FOLLOW | _FLAGS, permissions)
    except OSError as error:
        # POSIX: ELOOP for a link under O_NOFOLLOW; ENXIO for a pipe that nobody reads, or a socket.
        if error.errno in (errno.ELOOP, errno.EMLINK) and is_link(path):
            raise UnsafePathError(f"{path} is a link") from error
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise UnsafePathError(f"{path} is not a regular file") from error
        raise
    if before is not None and not os.path.samestat(before, os.fstat(handle)):
        os.close(handle)
        raise UnsafePathError(f"{path} was replaced while it was opened")
    return handle


def _regular(handle: int, path: Path) -> os.stat_result:
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePathError(f"{path} is not a regular file")
    return status
