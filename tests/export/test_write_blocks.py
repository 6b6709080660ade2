"""Blocks on their way to the disk: two threads, a bounded number, and what a file system without O_DIRECT does."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from qlora import disk
from qlora.export import write_blocks
from qlora.export.write_blocks import BLOCK_BYTES, IN_FLIGHT, Block, WriteThreads


def test_a_block_ends_where_a_multiple_of_blocks_does() -> None:
    block = Block(np.zeros(BLOCK_BYTES, np.uint8), BLOCK_BYTES + 10)
    assert block.room == BLOCK_BYTES - 10
    assert block.fill(np.ones(BLOCK_BYTES, np.uint8)) == block.room and block.used == block.room
    assert block.fill(np.ones(1, np.uint8)) == 0


def test_no_more_than_a_few_blocks_are_on_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, go, sent = WriteThreads(), threading.Event(), list[int]()
    monkeypatch.setattr(Block, "write", lambda self, file: go.wait(60))
    with disk.open_to_write(tmp_path / "x", "new") as file:

        def send() -> None:
            for number in range(IN_FLIGHT + 1):
                threads.write(threads.block(number * BLOCK_BYTES), file)
                sent.append(number)

        sender = threading.Thread(target=send)
        sender.start()
        sender.join(1)
        assert len(sent) == IN_FLIGHT, "one more has to wait"
        go.set()
        sender.join(60)
        assert len(sent) == IN_FLIGHT + 1
        threads.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("sha256", "write"))]


def test_memory_is_not_used_again_before_it_is_hashed(tmp_path: Path) -> None:
    threads, go, digest = WriteThreads(), threading.Event(), hashlib.sha256()
    with disk.open_to_write(tmp_path / "x", "new") as file:
        block = threads.block(0)
        block.fill(np.full(BLOCK_BYTES, 7, np.uint8))
        threads.after_hashes(lambda: str(go.wait(60)))
        threads.hash(block, digest)
        written = threads.write(block, file)
        while os.fstat(file.fileno()).st_size < BLOCK_BYTES:
            pass
        assert not written.done() and threads.block(0).memory is not block.memory
        go.set()
        written.result()
        assert threads.block(0).memory is block.memory
        threads.shutdown()
    assert digest.digest() == hashlib.sha256(bytes([7]) * BLOCK_BYTES).digest()


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
@pytest.mark.parametrize("refused", ["the flag", "what is written"])
def test_a_file_system_that_knows_no_way_past_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    import fcntl

    control, flags = fcntl.fcntl, list[bool]()

    def refuse(file: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL:
            flags.append(bool(value & os.O_DIRECT))
            if refused == "the flag":
                raise OSError(errno.EINVAL, "Invalid argument")
        return control(file, command, value)

    monkeypatch.setattr(write_blocks.fcntl, "fcntl", refuse)
    threads = WriteThreads()
    with disk.open_to_write(tmp_path / "x", "new") as file:
        block = threads.block(0)
        block.fill(np.arange(BLOCK_BYTES, dtype=np.uint8))
        if refused == "what is written":
            block.memory = np.concatenate([np.zeros(1, np.uint8), block.memory])[1:]  # no address that O_DIRECT takes
        block.write(file)
    threads.shutdown()
    assert flags[0] and (tmp_path / "x").read_bytes() == np.arange(BLOCK_BYTES, dtype=np.uint8).tobytes()
