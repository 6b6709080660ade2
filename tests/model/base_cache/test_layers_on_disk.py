"""Layers that RAM is too short for are read from files: of a kept base, or of a folder that goes with the model."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from qlora import disk
from qlora.errors import ModelError, UserError
from qlora.model import emptied
from qlora.model.base_cache import keeping, places
from qlora.model.base_cache.layers_on_disk import LayersOnDisk
from qlora.model.base_cache.record import PieceRecord
from qlora.model.layer_blobs import LayerWeights
from qlora.model.weight_receiving import Place
from qlora.model.weight_streaming import StreamedWeights, inside
from tests.families import make_base
from tests.model.base_cache.cases import aged, kept, load, resealed
from tests.model.conftest import logits

STREAMED = Place(streams=True)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM has room for nothing that waits."""
    monkeypatch.setattr(keeping, "RAM_SHARE", 0.0)


def answer(model: Any) -> torch.Tensor:
    return logits(model, torch.arange(5, 29).view(2, 12))


def streamed(model: Any) -> StreamedWeights:
    found = inside(model)
    assert found is not None
    return found


def files_of(model: Any) -> list[Path]:
    store = streamed(model).store
    assert isinstance(store, LayersOnDisk) and store.host_bytes == 0
    return [one.path for one in store._files if one is not None]


def own_folders() -> list[Path]:
    return list(places.root().glob(".layers.tmp-*"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_they_compute_what_resident_ones_do(tmp_path: Path, family: str, short: None) -> None:
    """First from files of this process, then, kept meanwhile, from the kept ones, as does the second start."""
    base = aged(make_base(family, tmp_path / "base", shards=2))
    wanted = answer(load(base, cache=False)[0])
    first, said = load(base, place=STREAMED)
    assert "is kept in 4 bit" in said[0] and not own_folders()
    second, said = load(base, place=STREAMED)
    assert "read from the cache" in said[0] and second.base_was_kept and not own_folders()
    for model in (first, second):
        assert {path.parent for path in files_of(model)} == set(kept())
        assert torch.equal(answer(model), wanted)


def test_where_it_is_not_kept_they_are_in_a_folder_of_the_process(base: Path, short: None) -> None:
    """ "auto" keeps no small base: the folder goes with the model, whether it is emptied or forgotten."""
    wanted = answer(load(base, cache=False)[0])
    for forgotten in (False, True):
        model, said = load(base, cache="auto", place=STREAMED)
        (own,) = own_folders()
        assert not said and not kept() and {path.parent for path in files_of(model)} == {own}
        assert own.stat().st_mode & 0o777 == 0o700 and torch.equal(answer(model), wanted)
        if not forgotten:
            emptied.empty(model)
            assert not own_folders()
        del model
        gc.collect()
        assert not own_folders()


def test_never_are_two_layers_in_memory_while_they_are_loaded(
    base: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs: list[Any] = []
    pack = LayerWeights.pack

    def packed(weights: LayerWeights) -> torch.Tensor:
        import weakref

        assert not [ref for ref in blobs if ref() is not None]
        blob = pack(weights)
        blobs.append(weakref.ref(blob))
        return blob

    monkeypatch.setattr(LayerWeights, "pack", packed)
    model, _ = load(base, cache="auto", place=STREAMED)
    assert len(blobs) == len(streamed(model).layers) and not any(
        parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim > 1
    )


def test_a_kept_base_is_in_use_for_as_long_as_the_model_lives(base: Path, short: None) -> None:
    for emptied_first in (True, False):
        model, _ = load(base, place=STREAMED)
        (folder,) = kept()
        assert places.in_use(folder)
        assert places.make_room(places.root(), 1 << 50, 1) == []
        if emptied_first:
            emptied.empty(model)
            assert not places.in_use(folder)
        del model
        gc.collect()
        assert not places.in_use(folder)


def test_another_layout_is_written_anew(base: Path, short: None) -> None:
    """A kept base whose tensors lie elsewhere is as good as any for a model, and no file that a slot could be given."""
    wanted = answer(load(base)[0])
    (folder,) = kept()

    def turned(said: dict[str, Any]) -> None:
        blob, end = said["blobs"][0], 0
        file, sizes = folder / blob["file"], [PieceRecord(**piece).nbytes for piece in blob["pieces"]]
        before, after = file.read_bytes(), bytearray()
        for piece, size in reversed(list(zip(blob["pieces"], sizes, strict=True))):
            after += before[piece["offset"] : piece["offset"] + size] + bytes(-size % 16)
            piece["offset"], end = end, len(after)
        blob["pieces"].reverse()
        assert len(after) == blob["bytes"]
        file.write_bytes(after)
        blob["blake3"] = blake3(after).hexdigest()

    resealed(folder, turned)
    model, said = load(base, place=STREAMED)
    assert "read from the cache" in said[0] and len(own_folders()) == 1
    assert [path.parent for path in files_of(model)] == [own_folders()[0], folder]
    assert torch.equal(answer(model), wanted)


def test_damage_at_the_start_is_set_aside_and_kept_anew(base: Path, short: None) -> None:
    wanted = answer(load(base)[0])
    (folder,) = kept()
    blob = folder / "layer-00001.blob"
    raw = bytearray(blob.read_bytes())
    raw[40] ^= 1
    blob.write_bytes(raw)
    model, said = load(base, place=STREAMED)
    assert "the original is read" in said[0] and not own_folders()
    assert {path.parent for path in files_of(model)} == {folder}, "not the broken one"
    assert torch.equal(answer(model), wanted)


def test_damage_later_on_is_an_error(base: Path, short: None) -> None:
    model, _ = load(base, place=STREAMED)
    answer(model)
    blob = files_of(model)[1]
    raw = bytearray(blob.read_bytes())
    raw[40] ^= 1
    blob.write_bytes(raw)
    streamed(model).reset()  # both of its layers are in a slot
    with pytest.raises(ModelError) as caught:
        answer(model)
    assert str(blob) in caught.value.what and "resume" in caught.value.hint


def test_without_room_on_the_disk_as_well(base: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in RAM where that holds them at all; else two lines say so, and where they are kept it is no matter."""
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda path: keeping.SPARE_BYTES)
        model, said = load(base, cache="auto", place=STREAMED)
        assert "they stay in RAM" in said[0] and streamed(model).store.host_bytes
        patch.setattr(keeping, "available_ram", lambda: 1000)
        with pytest.raises(UserError) as caught:
            load(base, cache="auto", place=STREAMED)
        assert "of RAM 1.0 KiB are free" in caught.value.what and "QLORA_CACHE" in caught.value.hint
    load(base)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 0)
    assert files_of(load(base, place=STREAMED)[0])


def test_a_disk_that_takes_nothing_is_two_lines(base: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora.model.base_cache.layers_on_disk.files.write_all", full)
    with pytest.raises(UserError, match="No space left") as caught:
        load(base, cache="auto", place=STREAMED)
    assert "QLORA_CACHE" in caught.value.hint
    del caught
    gc.collect()
    shutil.rmtree(places.root(), ignore_errors=True)


def test_with_room_in_ram_or_without_leave_to_keep_they_stay_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(streamed(load(base, place=STREAMED)[0]).store, LayersOnDisk)
    monkeypatch.setattr(keeping, "RAM_SHARE", 0.0)
    assert not isinstance(streamed(load(base, cache=False, place=STREAMED)[0]).store, LayersOnDisk)
    assert inside(load(base)[0]) is None
