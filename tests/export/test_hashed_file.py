"""A file that is written from front to back, with its hash."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora.disk import sha256_file
from qlora.export.hashed_file import HashedFile


def test_the_hash_runs_along_and_goes_on_after_a_cut(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as hashing:
        file = HashedFile(tmp_path / "x", hashing)
        for piece in (b"one", b"", b"two"):
            file.append(piece)
        assert file.size == 6 and file.snapshot().result() == sha256_file(tmp_path / "x")
        file.append(b"three")
        file.sync()
        file.close()
        again = HashedFile(tmp_path / "x", hashing)
        assert again.resume(6) == hashlib.sha256(b"onetwo").hexdigest()
        again.append(b"!")
        again.close()
        assert (tmp_path / "x").read_bytes() == b"onetwo!" and again.snapshot().result() == sha256_file(tmp_path / "x")
        with pytest.raises(OSError, match="is shorter than 99 bytes"):
            HashedFile(tmp_path / "x", hashing).resume(99)
