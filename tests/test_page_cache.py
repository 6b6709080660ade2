"""What is read of a large file leaves the page cache as it was: pages that were there stay, others go."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora import page_cache
from qlora.model.tensors import find_tensors, read_ahead
from qlora.page_cache import LeftAsFound, held_pages

PAGE = mmap.PAGESIZE
on_linux = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such call")


def forgotten(path: Path) -> None:
    """Out of the page cache, or skipped where the file system keeps all of it there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(held_pages(file) or b"\1"):
            pytest.skip("the file system has no page cache to leave, or does not tell")


@on_linux
def test_a_base_that_is_read_ahead_is_not_in_the_cache_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weight = torch.arange(2 << 20, dtype=torch.float32).view(-1, 1024)  # 8 MiB
    save_file({"w": weight}, path)
    entry = find_tensors(tmp_path)["w"]
    spans = [(start, start + 100) for start in range(0, 2000, 100)]

    def pages_after(cache: LeftAsFound | None) -> int:
        forgotten(path)
        assert torch.equal(torch.cat(list(read_ahead(entry, spans, cache=cache))), weight[:2000])
        with path.open("rb") as file:
            return sum(held_pages(file) or b"")

    assert pages_after(None) > 1500
    assert pages_after(LeftAsFound()) <= 1 + 2048 - entry.offset // PAGE - 2000, (
        "what was not read yet, and a last page"
    )


@on_linux
@pytest.mark.parametrize("held", ["", "0", "5", "0 1 2 3 4 5 6 7 8 9", "2 3 6"])
def test_pages_that_were_there_before_are_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    before = {int(number) for number in held.split()}
    (tmp_path / "file").write_bytes(bytes(10 * PAGE + 7))
    dropped: set[int] = set()

    def drop(handle: int, start: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert start % PAGE == count % PAGE == 0 < count, "of a part of a page nothing would be dropped"
        dropped.update(range(start // PAGE, (start + count) // PAGE))

    monkeypatch.setattr(page_cache, "held_pages", lambda stream: bytes(page in before for page in range(11)))
    monkeypatch.setattr(os, "posix_fadvise", drop)
    cache = LeftAsFound()
    with (tmp_path / "file").open("rb") as file:
        cache.see(file)
        cache.leave(file, 100, 3 * PAGE + 10)
        assert dropped == {0, 1, 2} - before, "the fourth is not all read"
        cache.leave(file, 3 * PAGE + 10, 10 * PAGE + 7)
    assert dropped == set(range(10)) - before


@on_linux
def test_a_file_whose_pages_nobody_tells_of_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * PAGE))
    monkeypatch.setattr(page_cache, "held_pages", lambda stream: None)
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: pytest.fail("dropped"))
    with (tmp_path / "file").open("rb") as file:
        cache = LeftAsFound()
        cache.see(file)
        cache.leave(file, 0, 3 * PAGE)
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        assert held_pages(file) is None
