"""Blobs on the host and in files reach a slot with the bytes that they were given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from qlora.copy_stream import CopyStream
from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.model import weight_stores
from qlora.model.weight_stores import DiskStore, HostBytes, HostStore, sizes_of_pieces
from tests.card import Card, rehearsal

CPU = torch.device("cpu")
MIB = 1 << 20


class Packed:
    """What a layer gives of itself."""

    def __init__(self, blob: torch.Tensor) -> None:
        self.blob = blob

    def pack(self) -> torch.Tensor:
        return self.blob


def blobs(*sizes: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (size,), generator=made, dtype=torch.uint8) for size in sizes]


def store_of(kept: list[torch.Tensor], recorder: Recorder) -> HostStore:
    store = HostStore(len(kept), CPU)
    for layer, blob in enumerate(kept):
        store.put(layer, Packed(blob.clone()))  # type: ignore[arg-type]
    store.settle(recorder)
    return store


def sent(store: Any, layer: int, nbytes: int, room: int = 0) -> torch.Tensor:
    copies, slot = CopyStream(CPU), torch.full((nbytes + room,), 7, dtype=torch.uint8)
    store.send(layer, slot, copies, copies.computed()).arrive()
    assert (slot[nbytes:] == 7).all()
    return slot[:nbytes]


@pytest.mark.parametrize("nbytes", [0, 1, MIB - 1, MIB, 107 * MIB + 5, 441 * MIB, 1300 * MIB])
def test_pieces_waste_less_than_a_mebibyte_where_memory_is_pinned_in_powers_of_two(nbytes: int) -> None:
    sizes = sizes_of_pieces(nbytes)
    assert sum(sizes) == nbytes and max(sizes, default=0) <= 512 * MIB
    assert all(size & (size - 1) == 0 for size in sizes[:-1]) and len(sizes) <= 12
    pinned = sum(1 << (size - 1).bit_length() for size in sizes)
    assert pinned - nbytes < MIB


def test_a_slot_has_the_bytes_of_the_blob() -> None:
    kept, recorder = blobs(64, 4096, 1000), Recorder()
    store = store_of(kept, recorder)
    assert store.host_bytes == 5160 and not recorder.events
    for layer, blob in enumerate(kept):
        assert blake3(sent(store, layer, len(blob), room=9).numpy()).digest() == blake3(blob.numpy()).digest()
    store.close()
    assert store.host_bytes == 0


def test_pinned_in_pieces_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stores, "SMALLEST_PIECE", 256)
    monkeypatch.setattr(weight_stores, "LARGEST_PIECE", 1024)
    kept, recorder = blobs(3000, 100), Recorder()
    with rehearsal(monkeypatch, Card()) as card:
        store = store_of(kept, recorder)
        assert card.calls["pin_memory"] == 6, "1024 + 1024 + 512 + 256 + 184, and 100"
        assert all(torch.equal(sent(store, layer, len(blob)), blob) for layer, blob in enumerate(kept))
    assert not recorder.events


def test_where_pinning_fails_the_rest_is_pageable_and_one_notice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once more than it succeeds, and never again."""
    kept, recorder, asked = blobs(1000, 1000, 1000, 1000), Recorder(), list[int]()
    with rehearsal(monkeypatch, Card()):
        pin = torch.Tensor.pin_memory

        def refused(tensor: torch.Tensor, *place: Any) -> torch.Tensor:
            asked.append(len(tensor))
            if len(asked) > 1:
                raise torch.AcceleratorError("CUDA error: out of memory")
            return pin(tensor)

        monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
        store = store_of(kept, recorder)
        assert len(asked) == 2
        assert all(torch.equal(sent(store, layer, len(blob)), blob) for layer, blob in enumerate(kept))
    (notice,) = recorder.of("notice")
    assert "75% of the streamed weights are copied more slowly" in notice.as_dict()["message"]


def files_of(folder: Path, kept: list[torch.Tensor]) -> list[Path]:
    paths = [folder / f"{layer}.blob" for layer in range(len(kept))]
    for path, blob in zip(paths, kept, strict=True):
        path.write_bytes(blob.numpy().tobytes())
    return paths


def disk_store(folder: Path, kept: list[torch.Tensor], hashed: bool = True) -> DiskStore:
    hashes = [blake3(blob.numpy()).hexdigest() if hashed else "" for blob in kept]
    return DiskStore(files_of(folder, kept), [len(blob) for blob in kept], hashes, CPU)


@pytest.mark.parametrize("on_card", [False, True])
def test_files_are_read_into_slots(on_card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = blobs(64, 5000, 1000)
    card = rehearsal(monkeypatch, Card()) if on_card else None
    if card is not None:
        card.__enter__()
    try:
        store = disk_store(tmp_path, kept)
        assert store.host_bytes == (2 * 5000 if on_card else 0)
        for layer in (0, 1, 2, 1, 0, 2):
            assert torch.equal(sent(store, layer, len(kept[layer]), room=3), kept[layer])
        store.close()
    finally:
        if card is not None:
            card.__exit__(None, None, None)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "a link"])
def test_a_file_that_is_not_what_was_written_is_an_error(damage: str, tmp_path: Path) -> None:
    kept = blobs(500, 500)
    store, path = disk_store(tmp_path, kept), tmp_path / "1.blob"
    raw = bytearray(path.read_bytes())
    raw[77] ^= 1
    if damage == "flipped":
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    else:
        path.rename(tmp_path / "elsewhere")
        if damage == "a link":
            path.symlink_to(tmp_path / "elsewhere")
    assert torch.equal(sent(store, 0, 500), kept[0])
    with pytest.raises(ModelError) as caught:
        sent(store, 1, 500)
    assert str(path) in caught.value.what and "resume" in caught.value.hint
    store.close()


def test_a_hash_is_compared_once_and_when_the_file_was_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, hashed = blobs(500), list[int]()
    store = disk_store(tmp_path, kept)
    monkeypatch.setattr(weight_stores, "blake3", lambda: (hashed.append(1), blake3())[1])
    for _ in range(3):
        sent(store, 0, 500)
    assert len(hashed) == 1
    path, raw = tmp_path / "0.blob", bytearray(kept[0].numpy().tobytes())
    os.utime(path, ns=(0, 10**9))
    assert torch.equal(sent(store, 0, 500), kept[0]) and len(hashed) == 2, "touched, and the same"
    raw[3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="its hash is another one"):
        sent(store, 0, 500)
    store.close()


def test_room_for_a_smaller_blob_is_the_beginning_of_it() -> None:
    room, blob = HostBytes(100, CPU), torch.zeros(40, dtype=torch.uint8)
    ((part, place),) = room.beside(blob)
    assert part.data_ptr() == blob.data_ptr() and len(place) == 40
