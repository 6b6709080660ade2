"""No byte of a damaged file is computed with; what is read goes to its place without a second copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.model.base_cache import places, reading
from tests.model.base_cache.cases import assert_same, counted, kept, load, resealed

READ_AGAIN = "the original is read"


def flipped(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def places_of(size: int) -> list[int]:
    return sorted({0, 7, 8, size // 3, size // 2, size - 1})


@pytest.mark.parametrize("name", ["layer-00000.blob", "layer-00001.blob", "others.safetensors"])
def test_a_flipped_bit_anywhere_is_found_and_the_original_read(base: Path, name: str) -> None:
    plain, _ = load(base)
    folder = kept()[0]
    for number, at in enumerate(places_of((folder / name).stat().st_size), start=1):
        flipped(folder / name, at)
        model, said = load(base)
        assert READ_AGAIN in said[0] and not model.base_was_kept, at
        assert f"now {folder.name}.broken{number}" in said[0] and "is kept in 4 bit" in said[1]
        assert_same(model, plain)
    assert load(base)[0].base_was_kept


CHANGES: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda folder: os.truncate(folder / "layer-00001.blob", 100),
    "longer": lambda folder: os.truncate(folder / "layer-00001.blob", 1 << 20),
    "gone": lambda folder: (folder / "layer-00001.blob").unlink(),
    "a folder": lambda folder: [(folder / "layer-00001.blob").unlink(), (folder / "layer-00001.blob").mkdir()],
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 1000),
    "another base's name": lambda folder: resealed(folder, lambda said: said["identity"].update(content="0" * 64)),
    "another form": lambda folder: resealed(folder, lambda said: said["settings"].update(double_quant=False)),
    "another type": lambda folder: resealed(
        folder, lambda said: [one.update(quant_type="fp4") for one in said["four_bit"].values()]
    ),
    "another shape": lambda folder: resealed(
        folder, lambda said: [one.update(shape=one["shape"][::-1]) for one in said["four_bit"].values()]
    ),
    "no such table": lambda folder: resealed(
        folder, lambda said: [one.update(code=9) for one in said["four_bit"].values()]
    ),
    "no such nested table": lambda folder: resealed(
        folder, lambda said: [one["nested"].update(code=9) for one in said["four_bit"].values()]
    ),
    "a short table": lambda folder: resealed(folder, lambda said: said.update(tables=[[0.0]] * 2)),
    "a tensor twice": lambda folder: resealed(
        folder, lambda said: said["blobs"][0]["pieces"].append({**said["blobs"][0]["pieces"][-1], "shape": [0]})
    ),
    "values in the place of codes": lambda folder: resealed(
        folder,
        lambda said: next(one for one in said["blobs"][0]["pieces"] if one["part"] == "codes").update(part="values"),
    ),
    "a part less": lambda folder: resealed(folder, lambda said: said["blobs"][0]["pieces"].pop()),
    "another layer": lambda folder: resealed(folder, lambda said: said["blobs"][0].update(layer="model.layers.1")),
    "constants of another length": lambda folder: resealed(
        folder, lambda said: said["blobs"][0]["pieces"][-1].update(shape=[0])
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_does_not_fit_is_not_read(base: Path, change: Callable[[Path], Any]) -> None:
    plain, _ = load(base)
    folder = kept()[0]
    change(folder)
    model, said = load(base)
    assert not model.base_was_kept and len(said) >= 1
    assert_same(model, plain)
    assert load(base)[0].base_was_kept, said


def test_a_pipe_is_not_waited_for(base: Path) -> None:
    plain, _ = load(base)
    file = kept()[0] / "layer-00001.blob"
    file.unlink()
    os.mkfifo(file)
    model, said = load(base)
    assert "is neither a file nor a folder" in said[0] and not model.base_was_kept
    assert_same(model, plain)


def test_on_a_card_it_goes_through_two_blocks(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = load(base)
    blocks: list[int] = []
    take = reading._Reading._next_block

    def next_block(self: Any) -> torch.Tensor:
        found = take(self)
        blocks.append(found.data_ptr())
        return found

    monkeypatch.setattr(reading, "is_card", lambda device: True)
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(reading._Reading, "_next_block", next_block)
    model, _ = load(base)
    assert model.base_was_kept and len(blocks) > 50
    assert_same(model, plain)


def test_on_the_cpu_each_byte_is_read_into_its_final_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(base)
    memory: dict[int, int] = {}
    into = reading._Reading._fill

    def fill(self: Any, view: memoryview) -> None:
        tensor = torch.frombuffer(view, dtype=torch.uint8)
        memory[tensor.data_ptr()] = len(view)
        into(self, view)

    monkeypatch.setattr(reading._Reading, "_fill", fill)
    with counted(monkeypatch) as read:
        model, _ = load(base)
    final = {}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        parts = [parameter.data, *([state.absmax, state.state2.absmax] if state is not None else [])]
        final |= {part.data_ptr(): part.nbytes for part in parts}
    assert final.items() <= memory.items() and read["original"] == 0
    beside = sum(memory.values()) - sum(final.values())
    assert beside < 16 * len(final) + 10_000  # space between tensors, and the header


def test_an_error_of_the_disk_sets_nothing_aside(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = load(base)
    (folder,) = kept()

    def broken(self: Any, view: memoryview) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(reading._Reading, "_fill", broken)
        model, said = load(base)
    assert "Input/output error" in said[0] and not model.base_was_kept
    assert_same(model, plain)
    assert kept() == [folder] and [one.folder for one in places.held(places.root())] == [folder]
    assert load(base)[0].base_was_kept
