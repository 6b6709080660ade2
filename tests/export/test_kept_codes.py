"""A merge onto a base that is kept in 4 bit: the same bytes, and nothing is quantized anew."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import disk
from qlora.events import Notice, Recorder
from qlora.export.merge import merge
from qlora.model.base_cache import places
from tests.export.cases import KINDS, export, trained
from tests.families import make_base
from tests.model.base_cache.cases import aged, kept, load
from tests.runs import change_unsampled_value


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return aged(make_base("llama", tmp_path / "base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter whose base is kept by a load before."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    trained(base, tmp_path / "support", KINDS["plain"])
    load(base)
    return tmp_path / "support"


def exported(adapter: Path, *to: str, **options: Any) -> tuple[dict[str, str], list[str]]:
    """Hashes of what an export on nf4 makes, and what it says of the cache."""
    sink = Recorder()
    report = export(adapter, *to, merge_base="nf4", sink=sink, verify=False, **options)
    found = {
        f"{one.format}/{name}": entry["sha256"]
        for one in report.products
        for name, entry in disk.read_manifest(one.folder)["files"].items()
    }
    return found, [one.message for one in sink.events if isinstance(one, Notice) and one.topic == "cache"]


def refusing(*_: Any, **__: Any) -> None:
    raise AssertionError("a weight is put into 4 bit that is kept")


def test_the_bytes_are_the_same_and_nothing_is_quantized_anew(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(kept()) == 1
    with monkeypatch.context() as patched:
        patched.setattr(merge.nf4, "quantize_rows", refusing)
        found, told = exported(adapter, "hf", "gguf", quants=("q8_0",))
    assert told == ["the merge reads the base in 4 bit from the cache"]
    places.remove(kept()[0])
    assert exported(adapter, "hf", "gguf", quants=("q8_0",)) == (found, [])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("blake3", "read", "write"))]


def cut(blob: Path) -> None:
    blob.write_bytes(blob.read_bytes()[:-1])


def change(blob: Path) -> None:
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, change, Path.unlink])
def test_what_is_damaged_is_made_of_the_original(adapter: Path, damage: Callable[[Path], None]) -> None:
    blobs = sorted(kept()[0].glob("*.blob"))
    assert len(blobs) > 1
    damage(blobs[-1])  # so that the first layers are read
    found, told = exported(adapter, "hf")
    assert any("is not read from the cache" in message for message in told)
    for folder in kept():
        places.remove(folder)
    assert exported(adapter, "hf") == (found, [])


def test_what_is_kept_of_another_base_is_not_merged_into(adapter: Path, base: Path) -> None:
    """A value that no sample sees was changed and the file's time put back: the content decides."""
    file = base / "model.safetensors"
    before = file.stat()
    change_unsampled_value(base)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    found, told = exported(adapter, "hf")
    assert len(kept()) == 1 and told == []
    places.remove(kept()[0])
    assert exported(adapter, "hf") == (found, [])
