"""The files of a kept base: their hashes, what holds which tensor, and models that are not to be kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import load_file

from qlora import disk, manifest
from qlora.model import load as module
from qlora.model.base_cache import places, record, writing
from qlora.model.layer_blobs import LayerWeights
from qlora.recipe.sections import QuantizationSection
from tests.families import make_base
from tests.model.base_cache.cases import aged, kept, load


def test_each_file_has_both_hashes_and_nothing_else_is_there(base: Path) -> None:
    load(base)
    folder = kept()[0]
    found = record.read(folder).record
    assert disk.verify_folder(folder) is None and manifest.standing(folder, hashes=True).whose == "ours"
    for blob in found.blobs:
        data = (folder / blob.file).read_bytes()
        assert blake3(data).hexdigest() == blob.blake3 and len(data) == blob.bytes
    assert {path.name for path in folder.iterdir()} == {*(blob.file for blob in found.blobs), "others.safetensors"} | {
        "manifest.json"
    }
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.blob"))


def test_a_blob_is_the_layers_own(base: Path) -> None:
    """Whoever streams layers from files reads these."""
    model, _ = load(base)
    folder = kept()[0]
    for number, blob in enumerate(record.read(folder).record.blobs):
        weights = LayerWeights(model.model.layers[number])
        assert (folder / blob.file).read_bytes() == weights.pack().numpy().tobytes()
        assert [(p.name, p.part, tuple(p.shape), p.offset) for p in blob.pieces] == [
            (p.name, p.part, p.shape, p.offset) for p in weights.layout.pieces
        ]


def test_other_tensors_are_safetensors_as_loaded(base: Path) -> None:
    model, _ = load(base)
    others = load_file(kept()[0] / "others.safetensors")
    parameters = dict(model.named_parameters())
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < others.keys()
    for name, value in others.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, parameters[name]), name
    hashes = record.read(kept()[0]).record.plain
    assert hashes == {
        name: blake3(value.view(torch.uint8).numpy().tobytes()).hexdigest() for name, value in others.items()
    }


def test_a_file_in_blocks_is_the_same_file(base: Path, monkeypatch: Any) -> None:
    load(base)
    folder = kept()[0]
    whole = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    disk.discard(folder)
    monkeypatch.setattr(writing, "_BLOCK_BYTES", 1000)
    load(base)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == whole


def test_a_model_that_holds_more_than_is_known_is_not_kept(base: Path, monkeypatch: Any) -> None:
    """A matrix that no layer's blob and no name of the files has would be missing at the next start."""
    groups = writing.groups

    def without_the_last(model: Any, sources: Any) -> Any:
        yield from list(groups(model, sources))[:-1]

    monkeypatch.setattr(writing, "groups", without_the_last)
    _, said = load(base)
    assert "is not kept in 4 bit: its layers hold" in said[-1] and not kept()
    assert [path.name for path in places.root().iterdir()] == [".lock"]


def test_more_matrices_than_a_manifest_holds_are_not_kept(base: Path, monkeypatch: Any) -> None:
    """A manifest that nobody reads would be set aside at each start, and the base be written again."""
    monkeypatch.setattr(writing._refuse_too_many, "__defaults__", (5,))
    _, said = load(base)
    assert "is not kept in 4 bit: it has 21 weights where 5 are the most" in said[-1] and not kept()


def test_matrices_in_4_bit_outside_of_layers_are_in_a_blob_of_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    """OPT's projections of the embeddings; and a model whose layers are not found has one blob."""
    monkeypatch.setattr("qlora.model.base_cache.contents.layers_of", lambda model: (_ for _ in ()).throw(LookupError()))
    base = aged(make_base("llama", tmp_path / "base"))
    first, _ = load(base)
    (blob,) = record.read(kept()[0]).record.blobs
    assert (blob.layer, blob.file) == ("", "outside.blob")
    second, _ = load(base, QuantizationSection())
    assert second.base_was_kept and module.is_4bit(second.model.layers[0].mlp.up_proj)
    assert torch.equal(first.model.layers[1].mlp.up_proj.weight.data, second.model.layers[1].mlp.up_proj.weight.data)
