"""A base's content is taken while its merge reads: the same hash, nothing read twice, and nothing published before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import device
from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export import hf
from qlora.export.base_content import left_as_found
from qlora.model import tensors
from qlora.model.identity import read_through
from qlora.model.meta_model import build, taken_tensors
from qlora.model.resolve import resolve
from qlora.page_cache import LeftAsFound
from tests.export.cases import KINDS, edit, exported, of_peft, trained
from tests.families import make_base
from tests.runs import change_unsampled_value
from tests.sampling import sampled

# "gguf" of the adapter alone reads no weight of the base.
WAYS: dict[str, dict[str, Any]] = {
    "full": {"merge_base": "full"},
    "nf4": {"merge_base": "nf4"},
    "q8_0": {"to": ["gguf"], "quants": ["q8_0"]},
    "adapter": {"to": ["adapter-gguf"]},
}


def in_full(base: Path) -> dict[str, Any]:
    found = resolve(str(base), "main", Recorder())
    return read_through(found.config, taken_tensors(found, build(found)), Recorder()).model_dump()


def kept_of(report: Any) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((report.products[0].folder / "export.json").read_text())["base_identity"]
    return known


def adapter_on(tmp_path: Path, kind: str, **shape: Any) -> tuple[Path, Path]:
    base = make_base("llama", tmp_path / "base", **shape)
    trained(base, tmp_path / "adapter", KINDS[kind])
    edit(tmp_path / "adapter" / "qlora.json", identity=in_full(base))
    return base, tmp_path / "adapter"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float32], torch.bfloat16), ids=str)
def test_it_is_the_hash_of_a_pass_of_its_own(tmp_path: Path, way: str, dtype: torch.dtype) -> None:
    """Also of fp32, whose rows a merge changes where they lie."""
    base, adapter = adapter_on(tmp_path, "some", dtype=dtype)
    assert kept_of(exported(adapter, out=tmp_path / "out", **WAYS[way])) == in_full(base)


def test_what_a_merge_reads_twice_is_hashed_once(tmp_path: Path) -> None:
    """An embedding's norms are of its columns, and want a pass before the rows are merged."""
    base = make_base("llama", tmp_path / "base")
    of_peft(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], use_dora=True)
    assert kept_of(exported(tmp_path / "adapter", out=tmp_path / "out", merge_base="full")) == in_full(base)


@pytest.mark.parametrize("way", ["full", "nf4", "q8_0"])
def test_each_byte_of_the_base_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    base, adapter = adapter_on(tmp_path, "some")
    read: Counter[int] = Counter()
    real = tensors._read

    def counted(entry: Any, stream: Any, rows: Any, memory: Any) -> torch.Tensor:
        got = real(entry, stream, rows, memory)
        if entry.file.parent == base:
            read[entry.offset] += got.nbytes
        return got

    monkeypatch.setattr(tensors, "_read", counted)
    exported(adapter, out=tmp_path / "out", **WAYS[way])
    taken = resolve(str(base), "main", Recorder()).tensors.values()
    assert read == Counter({entry.offset: entry.nbytes for entry in taken})


@pytest.mark.parametrize("way", WAYS)
def test_a_value_that_no_sample_sees_is_found_before_anything_is_published(tmp_path: Path, way: str) -> None:
    base, adapter = adapter_on(tmp_path, "some")
    change_unsampled_value(base)
    sink = Recorder()
    with pytest.raises(ExportError, match="another fine-tune of the same shape"):
        exported(adapter, out=tmp_path / "out", sink=sink, **WAYS[way])
    assert not sink.of("exported") and sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_export_that_goes_on_reads_what_the_one_before_had_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not merged again is not hashed by the merge; still the whole content is compared."""
    base, adapter = adapter_on(tmp_path, "some")
    real, starts = hf.fill, []

    def killed(merge: Any, staged: Any, sink: Any) -> int:
        starts.append(staged.start)
        done = real(merge, staged, sink)
        if len(starts) == 1:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(hf, "fill", killed)
    with pytest.raises(KeyboardInterrupt):
        exported(adapter, out=tmp_path / "out")
    assert kept_of(exported(adapter, out=tmp_path / "out")) == in_full(base)
    assert starts[1] > 0


def test_values_that_are_not_finite_end_the_reading(tmp_path: Path) -> None:
    file = make_base("llama", tmp_path / "base") / "model.safetensors"
    entry = tensors.read_header(file)["model.norm.weight"]
    seen: list[torch.Tensor] = []
    assert torch.equal(next(tensors.read_ahead(entry, [(0, entry.shape[0])], seen.append)), seen[0])


def test_a_base_that_nobody_finds_in_the_page_cache_again_is_not_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resolve(str(make_base("llama", tmp_path / "base")), "main", Recorder())
    size = sum(entry.nbytes for entry in base.tensors.values())
    monkeypatch.setattr(device, "available_ram", lambda: 2 * size)
    assert left_as_found(base, 1) and not left_as_found(base, 2)
    monkeypatch.setattr(device, "available_ram", lambda: 2 * size - 2)
    assert left_as_found(base, 2), "its beginning would be gone when its end is read"


@pytest.mark.parametrize(("to", "kept"), [(["hf"], False), (["hf", "gguf"], True)])
def test_an_export_reads_by_it_where_it_reads_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: list[str], kept: bool
) -> None:
    _, adapter = adapter_on(tmp_path, "some")
    left: list[int] = []
    monkeypatch.setattr(LeftAsFound, "leave", lambda self, stream, start, end: left.append(end - start))
    exported(adapter, to=to, merge_base="full", out=tmp_path / "out")
    assert bool(left) != kept
