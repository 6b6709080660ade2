"""Large files are read without filling the system's page cache: what is read leaves it as it was.

An export reads its base from front to back, once. Kept, its pages push out those of other programs, and each is new
memory: on a virtual machine whose free memory lies with its host a GB took 1 to 1.7 s of processor time to read, 0.1 to
0.25 where pages are used again (Linux 6.18, ext4 on a virtual disk). What was in the cache before stays there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import IO

import numpy as np

# Behind what was read: Linux keeps pages in folios (2 MiB at most on x86), and drops only those that it is given whole.
FOLIO_BYTES = 4 << 20
_HELD = bytes(byte & 1 for byte in range(256))  # mincore(2): "the least significant bit"


class LeftAsFound:
    """Files that are read, each with which of its pages were in the cache when it was `seen` first."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], bytes | None] = {}

    def see(self, stream: IO[bytes]) -> None:
        """To be called before anything large is read of a file."""
        status = os.fstat(stream.fileno())
        if (status.st_dev, status.st_ino) not in self._held:
            self._held[status.st_dev, status.st_ino] = held_pages(stream)

    def leave(self, stream: IO[bytes], start: int, end: int) -> None:
        """The bytes from `start` up to `end` have been read: pages that were not there before may go.

        The last page goes with what is read next, if only some of it was read now.
        """
        status = os.fstat(stream.fileno())
        held = self._held.get((status.st_dev, status.st_ino))
        if held is None:
            return
        at, last = max(0, start - FOLIO_BYTES) // mmap.PAGESIZE, end // mmap.PAGESIZE
        while at < last:
            found = held.find(1, at, last)
            free = last if found < 0 else found
            if free > at:
                place, count = at * mmap.PAGESIZE, (free - at) * mmap.PAGESIZE
                os.posix_fadvise(stream.fileno(), place, count, os.POSIX_FADV_DONTNEED)
            after = held.find(0, free, last)
            at = last if after < 0 else after


def held_pages(stream: IO[bytes]) -> bytes | None:
    """Of each page of a file, 1 where it is in the page cache and else 0; None where the system does not tell.

    Linux says of a file that is neither ours nor ours to write that all of it is there (mincore(2), since 5.2).
    """
    size = os.fstat(stream.fileno()).st_size
    if not size or not hasattr(os, "posix_fadvise"):
        return None
    told = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        with mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ) as mapped:
            place = np.frombuffer(mapped, np.uint8).ctypes.data
            failed = mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), told)
    except (OSError, AttributeError, ValueError):  # no such function, no map of such a file
        return None
    return None if failed else bytes(told).translate(_HELD)
