"""What is sent is what was looked at: a file that has become another is an error before a block of it goes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qlora import files
from qlora.errors import ExportError
from qlora.outgoing import Outgoing, git_hash


def test_the_hash_of_text_is_gits(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"one\ntwo\n")
    done = subprocess.run(["git", "hash-object", "--no-filters", "x"], capture_output=True, text=True, cwd=tmp_path)
    assert git_hash(b"one\ntwo\n") == done.stdout.strip()


def test_a_file_that_changes_while_it_is_sent_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"short")
    gone = Outgoing("x.gguf", 100, "0" * 64, tmp_path / "x")
    with pytest.raises(ExportError, match="has become shorter"):
        list(gone.blocks(0, 100))
    with pytest.raises(ExportError, match="was changed while it was sent"):
        Outgoing("x.md", 5, "0" * 64, tmp_path / "x").whole()
    (tmp_path / "x").unlink()
    with pytest.raises(ExportError, match="cannot be read any more"):
        list(gone.blocks(0, 100))
    (tmp_path / "x").symlink_to("/etc/hostname")
    with pytest.raises(ExportError, match="cannot be read any more"):
        list(gone.blocks(0, 1))


@pytest.mark.parametrize("how", ["replaced", "written into"])
def test_another_file_of_the_same_size_is_not_sent(tmp_path: Path, how: str) -> None:
    place = tmp_path / "x"
    place.write_bytes(b"weights")
    with files.open_to_read(place) as file:
        item = Outgoing("x.gguf", 7, "0" * 64, place, files.state_of(file))
    assert b"".join(item.blocks(2, 5)) == b"ights" and item.beginning(3) == b"wei" and item.beginning(99) == b"weights"
    before = place.stat()
    if how == "replaced":
        (tmp_path / "y").write_bytes(b"private")
        os.replace(tmp_path / "y", place)
    else:
        place.write_bytes(b"private")
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ExportError, match="was changed while it was sent"):
        list(item.blocks(0, 7))
