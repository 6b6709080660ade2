"""A file of an export under way: its sha256 runs along while it is written."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from concurrent.futures import Future, wait
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from qlora import disk
from qlora.export.write_blocks import Block, WriteThreads


class HashedFile:
    """A file written from front to back by `threads`, which also take its sha256, a few blocks behind `append`.

    `size` is what has been appended; it is on its way to the disk after `flush`, and there after `sync`. What went
    wrong on the way is raised by whatever comes next. Nothing is open while nothing is written.
    """

    def __init__(self, path: Path, threads: WriteThreads) -> None:
        self.path = path
        self.size = 0
        self._threads = threads
        self._digest = hashlib.sha256()
        self._file: FileIO | None = None
        self._block: Block | None = None
        self._writes: deque[Future[None]] = deque()  # the oldest first; one that failed stays

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
        """Add the bytes of `data`, a contiguous buffer. They are copied: it may be changed afterwards."""
        view = memoryview(data)
        if not view.nbytes:
            return
        left = np.frombuffer(view.cast("B"), np.uint8)
        if self._file is None:
            self._file = disk.open_to_write(self.path, "existing" if self.size else "replace")
        while self._writes and self._writes[0].done():
            self._writes[0].result()
            self._writes.popleft()
        while len(left):
            if self._block is None:
                self._block = self._threads.block(self.size)
            count = self._block.fill(left)
            left = left[count:]
            self.size += count
            if self._block.used == self._block.room:
                self.flush()

    def snapshot(self) -> Future[str]:
        """The sha256 of what has been appended up to now, once it is hashed."""
        if self._block is not None:
            self._threads.hash(self._block, self._digest)
        return self._threads.after_hashes(lambda: self._digest.copy().hexdigest())

    def flush(self) -> None:
        """Send what has been appended on its way to the disk, though it does not fill a block."""
        if self._block is not None and self._file is not None:
            self._threads.hash(self._block, self._digest)
            self._writes.append(self._threads.write(self._block, self._file))
            self._block = None  # last: whoever is interrupted before writes it once more, to the same place

    def wait(self) -> None:
        """Wait until what was flushed can be read. Raises OSError where it could not be written."""
        for written in list(self._writes):
            written.result()

    def sync(self) -> None:
        """Wait until what was flushed is on the disk. Raises OSError where it is not."""
        if self._file is not None:
            self.wait()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Wait until nothing of it is being written, and leave it as it is then."""
        wait(list(self._writes))
        self._block = None
        if self._file is not None:
            self._file.close()
            self._file = None
