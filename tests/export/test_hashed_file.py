"""A file that is written from front to back, with its hash."""

from __future__ import annotations

import errno
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora.disk import sha256_file
from qlora.export.hashed_file import HashedFile
from qlora.export.write_blocks import BLOCK_BYTES, Block, WriteThreads


@pytest.fixture
def threads() -> Iterator[WriteThreads]:
    threads = WriteThreads()
    yield threads
    threads.shutdown()


def test_the_hash_runs_along_and_goes_on_after_a_cut(tmp_path: Path, threads: WriteThreads) -> None:
    file = HashedFile(tmp_path / "x", threads)
    for piece in (b"one", b"", b"two"):
        file.append(piece)
    file.flush()
    file.wait()
    assert file.size == 6 and file.snapshot().result() == sha256_file(tmp_path / "x")
    file.append(b"three")
    file.flush()
    file.sync()
    file.close()
    again = HashedFile(tmp_path / "x", threads)
    assert again.resume(6) == hashlib.sha256(b"onetwo").hexdigest()
    again.append(b"!")
    again.flush()
    again.close()
    assert (tmp_path / "x").read_bytes() == b"onetwo!" and again.snapshot().result() == sha256_file(tmp_path / "x")
    with pytest.raises(OSError, match="is shorter than 99 bytes"):
        HashedFile(tmp_path / "x", threads).resume(99)


def test_blocks_begin_and_end_anywhere(tmp_path: Path, threads: WriteThreads) -> None:
    """Whole blocks past the page cache and what lies between them through it: one file, each byte in its place."""
    drawn = random.Random(5)
    file, all_of_it = HashedFile(tmp_path / "x", threads), bytearray()
    for length in (1, BLOCK_BYTES, 4095, 3 * BLOCK_BYTES + 7, 12_288, BLOCK_BYTES - 7, 5):
        piece = bytearray(drawn.randbytes(length))
        file.append(piece)
        all_of_it += piece
        piece[:] = bytes(length)  # whoever appended it may change it
        if length % 2:
            file.flush()
        assert file.snapshot().result() == hashlib.sha256(all_of_it).hexdigest()
    file.flush()
    file.sync()
    assert (tmp_path / "x").read_bytes() == all_of_it
    file.close()
    again = HashedFile(tmp_path / "x", threads)
    again.resume(BLOCK_BYTES + 4097)
    again.append(all_of_it[BLOCK_BYTES + 4097 :])
    again.flush()
    again.close()
    assert (tmp_path / "x").read_bytes() == all_of_it
    assert again.snapshot().result() == hashlib.sha256(all_of_it).hexdigest()


def test_what_could_not_be_written_is_raised_by_all_that_comes_after(
    tmp_path: Path, threads: WriteThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(block: Block, file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Block, "write", full)
    file = HashedFile(tmp_path / "x", threads)
    file.append(b"one")
    file.flush()
    for _ in range(2):
        for work in (file.wait, file.sync, lambda: file.append(b"two")):
            with pytest.raises(OSError, match="No space left"):
                work()
    file.close()
