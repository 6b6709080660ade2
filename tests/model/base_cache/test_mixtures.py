"""A mixture is kept in 4 bit, experts, routers and all: its second start reads that alone, resident or streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.model.base_cache import keeping, places, record
from qlora.model.base_cache.layers_on_disk import LayersOnDisk
from qlora.model.experts import Slab
from qlora.model.mxfp4 import Mxfp4Stack
from qlora.model.weight_receiving import Place
from qlora.model.weight_streaming import inside
from qlora.recipe.sections import QuantizationSection
from tests import mxfp4
from tests.mixtures import FAMILIES, make_base
from tests.model.base_cache.cases import aged, assert_same, counted, kept, load, resealed
from tests.model.conftest import logits

STREAMED = Place(streams=True)
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def answer(model: Any) -> torch.Tensor:
    return logits(model, torch.arange(5, 29).view(2, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_start_is_the_first_bit_for_bit(tmp_path: Path, family: str) -> None:
    base = aged(make_base(family, tmp_path / "base", shards=2))
    plain, said = load(base, cache=False)
    assert not said and not kept()
    first, (told,) = load(base)
    assert "is kept in 4 bit" in told and not first.base_was_kept
    second, (told,) = load(base)
    assert "is read from the cache in 4 bit" in told and second.base_was_kept
    assert any(isinstance(module, Slab) for module in second.modules())
    assert_same(first, plain)
    assert_same(second, plain)
    third, (told,) = load(base, place=STREAMED)
    assert "is read from the cache" in told and torch.equal(answer(third), answer(plain))


@pytest.mark.parametrize("form", [{"double_quant": False}, {"type": "fp4"}], ids=str)
def test_other_forms(tmp_path: Path, form: dict[str, Any]) -> None:
    base, section = aged(make_base("qwen3_moe", tmp_path / "base")), QuantizationSection(**form)
    first, _ = load(base, section)
    second, _ = load(base, section)
    assert second.base_was_kept
    assert_same(second, first)


def test_experts_that_stay_in_16_bit_are_in_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values are no multiple of 64 an expert. Of a streamed one that turns out to be damaged, the original is
    read into places that were given back already."""
    overrides = {"hidden_size": 40, "head_dim": 10, "moe_intermediate_size": 18}
    base = aged(make_base("qwen3_moe", tmp_path / "base", overrides=overrides))
    plain, _ = load(base, cache=False)
    assert not any(isinstance(module, Slab) for module in plain.modules())
    load(base)
    second, _ = load(base)
    assert second.base_was_kept
    assert_same(second, plain)
    flip(kept()[0] / "layer-00001.blob")
    third, said = load(base, place=STREAMED)
    assert "is damaged" in said[0] and torch.equal(answer(third), answer(plain))


def test_the_second_start_reads_4_bit_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = aged(make_base("qwen3_moe", tmp_path / "base", shards=2))
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    with counted(monkeypatch) as first:
        load(base)
    with counted(monkeypatch) as second:
        load(base, place=STREAMED)
    folder = kept()[0]
    assert first["original"] > 0.9 * weights and second["original"] == 0
    assert second["cache"] == sum(file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json")
    assert second["cache"] < weights / 2
    found = record.read(folder).record
    stack = found.stacks[GATE_UP]
    assert stack.shape == [8, 64, 64] and stack.quant_type == "nf4" and set(stack.tables) == {"table", "nested_table"}
    parts = {piece.part for blob in found.blobs for piece in blob.pieces if blob.full_name(piece) == GATE_UP}
    assert parts == {"codes", "absmax", "nested_absmax", "offset"}
    assert {f"{layer}.{piece}" for layer in ("model.layers.0", "model.layers.1") for piece in ("mlp.gate.weight",)} <= {
        blob.full_name(piece) for blob in found.blobs for piece in blob.pieces
    }, "a router is in its layer's blob"


def flip(path: Path, at: int = 40) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("place", [Place(), STREAMED], ids=["resident", "streamed"])
def test_a_flipped_bit_of_an_expert_is_found_and_the_original_read(tmp_path: Path, place: Place) -> None:
    base = aged(make_base("qwen3_moe", tmp_path / "base"))
    plain, _ = load(base)
    found = record.read(kept()[0]).record
    blob = next(blob for blob in found.blobs if blob.layer == "model.layers.1")
    piece = next(piece for piece in blob.pieces if piece.part == "offset")
    flip(kept()[0] / blob.file, piece.offset + 1)
    second, said = load(base, place=place)
    assert "layer-00001.blob is damaged" in said[0] and not second.base_was_kept
    assert torch.equal(answer(second), answer(plain))


def test_layers_stay_on_the_disk_where_ram_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "RAM_SHARE", 0.0)
    base = aged(make_base("qwen3_5_moe_text", tmp_path / "base"))
    plain, _ = load(base, cache=False)
    for _ in range(2):  # written by this process and then kept; then the kept ones
        model, _ = load(base, place=STREAMED)
        streamed = inside(model)
        assert streamed is not None and isinstance(streamed.store, LayersOnDisk) and streamed.store.host_bytes == 0
        assert {one.path.parent for one in streamed.store._files if one is not None} == set(kept())
        assert torch.equal(answer(model), answer(plain))
        flip(streamed.store._files[0].path) if model.base_was_kept else None  # type: ignore[union-attr]
    third, said = load(base, place=STREAMED)
    assert "is damaged" in said[0] and torch.equal(answer(third), answer(plain))


@pytest.mark.parametrize("place", [Place(), STREAMED], ids=["resident", "streamed"])
def test_experts_in_mxfp4_are_kept_as_they_are_published(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = aged(mxfp4.make_base(tmp_path / "base"))
    plain, _ = load(base, cache=False)
    stacks = [name for name, module in plain.named_modules() if isinstance(module, Mxfp4Stack)]
    first, _ = load(base, place=place)
    assert torch.equal(answer(first), answer(plain))
    with counted(monkeypatch) as read:
        second, said = load(base, place=place)
    assert "is read from the cache" in said[0] and read["original"] == 0
    assert torch.equal(answer(second), answer(plain))
    found = record.read(kept()[0]).record
    assert stacks and found.stacks.keys() == set(stacks)
    assert {one.quant_type for one in found.stacks.values()} == {"mxfp4"}
    assert {piece.part for blob in found.blobs for piece in blob.pieces if blob.full_name(piece) == stacks[0]} == {
        "codes",
        "scales",
    }


def test_auto_keeps_no_base_that_would_have_as_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LEAST_BYTES", 0)
    base = aged(make_base("qwen3_moe", tmp_path / "base"))
    monkeypatch.setattr(keeping, "WORTH_SHARE", 0.1)
    assert load(base, cache="auto")[1] == [] and not kept()
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "LEAST_BYTES", 0)
    assert "is kept in 4 bit" in load(base, cache="auto")[1][0]


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another shape": lambda said: said["stacks"][GATE_UP].update(shape=[8, 64, 128]),
    "another kind": lambda said: said["stacks"][GATE_UP].update(quant_type="fp4"),
    "no table": lambda said: said["stacks"][GATE_UP].update(tables={}),
    "a table that is not there": lambda said: said["stacks"][GATE_UP]["tables"].update(table=9),
    "a table of other length": lambda said: said["stacks"][GATE_UP]["tables"].update(
        table=said["stacks"][GATE_UP]["tables"]["nested_table"]
    ),
    "a buffer of our own": lambda said: said["stacks"][GATE_UP]["tables"].update(training=0),
    "no stack": lambda said: said["stacks"].pop(GATE_UP),
    "stacks of nobody": lambda said: said["stacks"].update(other=said["stacks"][GATE_UP]),
    "a part less": lambda said: _pieces(said).remove(next(one for one in _pieces(said) if one["part"] == "offset")),
    "constants of another type": lambda said: next(
        one for one in _pieces(said) if one["part"] == "absmax" and one["name"].endswith("gate_up_proj")
    ).update(dtype="BOOL"),
}


def _pieces(said: dict[str, Any]) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = said["blobs"][1]["pieces"]
    return pieces


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_does_not_fit_is_not_read(tmp_path: Path, lie: Callable[[dict[str, Any]], Any]) -> None:
    base = aged(make_base("qwen3_moe", tmp_path / "base"))
    plain, _ = load(base)
    resealed(kept()[0], lie)
    second, said = load(base)
    assert "is not read from the cache" in said[0] and not second.base_was_kept
    assert_same(second, plain)
