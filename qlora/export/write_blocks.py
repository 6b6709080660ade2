"""Blocks of bytes on their way to the disk: one thread hashes them, another writes them, in the order they came in.

Whole blocks go past the page cache where the file system takes that (O_DIRECT, open(2)): a copy into the cache costs
more of a processor than all else that an export does with a byte (ext4 on a virtual disk: 0.9 to 1.7 s of system time
a GB with its flush, 0.06 without the cache), and an export as large as the memory would push the base out of it.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

if sys.platform != "win32":
    import fcntl

BLOCK_BYTES = 4 << 20
IN_FLIGHT = 8  # 32 MiB between what merges and the disk
# What O_DIRECT wants addresses, places in the file and lengths to be multiples of: no disk's block is larger.
DIRECT_BYTES = 4096


@dataclass(eq=False)
class Block:
    """The bytes of a file from `offset` on that have not been written yet: `used` of them, `hashed` given to its hash.

    A block ends where a multiple of BLOCK_BYTES does, `room` bytes behind its beginning.
    """

    memory: NDArray[np.uint8]
    offset: int
    used: int = 0
    hashed: int = 0

    @property
    def room(self) -> int:
        return BLOCK_BYTES - self.offset % BLOCK_BYTES

    def fill(self, data: NDArray[np.uint8]) -> int:
        """Copies as much of `data` as has room. Returns how much that was."""
        count = min(len(data), self.room - self.used)
        self.memory[self.used : self.used + count] = data[:count]
        self.used += count
        return count

    def write(self, file: FileIO) -> None:
        aligned = self.offset % DIRECT_BYTES == 0 and self.used % DIRECT_BYTES == 0
        direct = _past_the_cache(file, aligned)
        left = self.memory[: self.used].data
        file.seek(self.offset)
        while left:
            try:
                left = left[file.write(left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                direct = _past_the_cache(file, False)  # it takes the flag, and not what we write


class WriteThreads:
    """The two threads behind the files of an export, and the memory of what is on its way through them."""

    def __init__(self) -> None:
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._room = threading.Semaphore(IN_FLIGHT)
        self._free: list[NDArray[np.uint8]] = []

    def block(self, offset: int) -> Block:
        """An empty block that begins at `offset` of its file."""
        memory = self._free.pop() if self._free else np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
        return Block(memory, offset)

    def hash(self, block: Block, digest: Any) -> None:
        """Has `digest` go on over what of the block it has not seen."""
        start, block.hashed = block.hashed, block.used
        if start < block.used:
            self._hashing.submit(digest.update, block.memory[start : block.used])

    def after_hashes(self, ask: Callable[[], str]) -> Future[str]:
        """What `ask` answers behind all that is being hashed now."""
        return self._hashing.submit(ask)

    def write(self, block: Block, file: FileIO) -> Future[None]:
        """Has the block written, which nobody adds to any more; waits while IN_FLIGHT of them have not been."""
        self._room.acquire()
        hashed = self._hashing.submit(int)
        return self._writing.submit(self._write, block, file, hashed)

    def _write(self, block: Block, file: FileIO, hashed: Future[Any]) -> None:
        try:
            block.write(file)
        finally:
            hashed.result()
            self._free.append(block.memory)
            self._room.release()

    def shutdown(self) -> None:
        """Ends both threads, when all that they were given is done."""
        self._hashing.shutdown()
        self._writing.shutdown()
        self._free.clear()


def _past_the_cache(file: FileIO, direct: bool) -> bool:
    """Whether what is written from now on goes past the page cache: as `direct` says, where the system can."""
    flag = getattr(os, "O_DIRECT", 0)
    if sys.platform != "win32" and flag:
        now = fcntl.fcntl(file, fcntl.F_GETFL)
        with suppress(OSError):  # EINVAL: a file system that has no such way
            if bool(now & flag) != direct:
                fcntl.fcntl(file, fcntl.F_SETFL, now ^ flag)
            return direct
    return False
