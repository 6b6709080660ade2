"""A file of an export under way: its sha256 runs along while it is written."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from qlora import disk


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
        with disk.open_to_write(self.path, "existing") as file:
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
            self._file = disk.open_to_write(self.path, "existing" if self.size else "replace")
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
