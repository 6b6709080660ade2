"""A manifest that lies is no manifest, though it is sealed as ours are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import foreign_json, manifest
from qlora.foreign_json import ForeignFileError
from qlora.model.base_cache import record
from tests.model.base_cache.cases import kept, load, resealed

LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another kind": lambda said: said.update(kind="tokens"),
    "no base": lambda said: said.pop("identity"),
    "a hash that is none": lambda said: said["blobs"][0].update(blake3="0"),
    "a file elsewhere": lambda said: said["blobs"][0].update(file="../../thesis.txt"),
    "a file of another layer": lambda said: said["blobs"][0].update(file=said["blobs"][1]["file"]),
    "another size": lambda said: said["blobs"][0].update(bytes=1 << 40),
    "a shape beyond the file": lambda said: said["blobs"][0]["pieces"][-1].update(shape=[1 << 40]),
    "a shape beyond all bounds": lambda said: said["blobs"][0]["pieces"][0].update(shape=[1 << 60]),
    "sixteen dimensions": lambda said: said["blobs"][0]["pieces"][0].update(shape=[1] * 16),
    "tensors over each other": lambda said: said["blobs"][0]["pieces"][1].update(offset=0),
    "before the file": lambda said: said["blobs"][0]["pieces"][0].update(offset=-16),
    "an unknown type": lambda said: said["blobs"][0]["pieces"][0].update(dtype="Q4"),
    "a block of none": lambda said: next(iter(said["four_bit"].values())).update(blocksize=0),
    "a table without end": lambda said: said.update(tables=[[0.0] * 100_000]),
    "a table of texts": lambda said: said.update(tables=[["0"]]),
    "a layer less": lambda said: said["blobs"].pop(),
}


def test_what_was_written_is_read(base: Path) -> None:
    load(base)
    found = record.read(kept()[0])
    assert found.record.base == str(base) and found.record.identity.content and found.record.original_bytes > 1000
    assert [blob.layer for blob in found.record.blobs] == ["model.layers.0", "model.layers.1"]
    names = list(found.record.names())
    assert len(set(names)) == len(names) and "model.layers.1.mlp.up_proj.weight" in names and "lm_head.weight" in names
    assert found.record.four_bit["model.layers.0.mlp.down_proj.weight"].shape == [64, 128]


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_are_refused(base: Path, lie: Callable[[dict[str, Any]], Any]) -> None:
    load(base)
    folder = kept()[0]
    resealed(folder, lie)
    with pytest.raises(ForeignFileError):
        record.read(folder)


def test_a_base_of_many_matrices_is_read(base: Path) -> None:
    """Its manifest is larger than what is read of other files of JSON; of the most matrices it is within its bound."""
    load(base)
    folder, count = kept()[0], 15_000

    def repeat(said: dict[str, Any]) -> None:
        name, one = next(iter(said["four_bit"].items()))
        (blob,) = [blob for blob in said["blobs"] if name.startswith(f"{blob['layer']}.")]
        pieces = [piece for piece in blob["pieces"] if f"{blob['layer']}.{piece['name']}" == name]
        said["blobs"] = []
        for layer in range(count // 500):
            file = f"layer-{layer:05d}.blob"
            many = [
                {**piece, "name": f"{piece['name']}.{number}", "shape": [0]}
                for number in range(500)
                for piece in pieces
            ]
            ends = [{**piece, "offset": 16 * at} for at, piece in enumerate(many)]
            said["blobs"].append(
                {**blob, "file": file, "layer": f"model.layers.{layer}", "pieces": ends, "bytes": 24_000}
            )
            said["files"][file] = {**said["files"]["layer-00000.blob"], "bytes": 24_000}
        said["four_bit"] = {f"{name}.{number}": one for number in range(count)}

    resealed(folder, repeat)
    size = (folder / manifest.MANIFEST).stat().st_size
    assert size > foreign_json.MAX_BYTES and size / count * record.MOST_MATRICES < manifest.MAX_BYTES
    assert len(record.read(folder).record.four_bit) == count
    assert manifest.standing(folder, hashes=False).whose == "changed", "ours, with other files than it says"


def test_without_a_seal_it_is_none(base: Path) -> None:
    load(base)
    file = kept()[0] / manifest.MANIFEST
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "base": "another"}))
    with pytest.raises(ForeignFileError, match="is damaged"):
        record.read(kept()[0])
    file.unlink()
    with pytest.raises(FileNotFoundError):
        record.read(kept()[0])
