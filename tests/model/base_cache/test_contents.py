"""What is foreseen of a kept base before a weight is read: its size, and what decides its bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.disk import size_of
from qlora.model import four_bit_layers as module
from qlora.model.base_cache.contents import Contents
from qlora.model.load import swap_all_linear
from qlora.model.meta_model import build, linear_layers
from qlora.recipe.sections import QuantizationSection
from tests import mixtures
from tests.families import FAMILIES, make_base
from tests.model.base_cache.cases import aged, base_at, kept, load
from tests.sampling import sampled


def contents_of(folder: Path, quantization: QuantizationSection) -> Contents:
    base = base_at(folder)
    meta_model = build(base)
    for name, linear in list(linear_layers(meta_model.model)):
        module.swap_linear(meta_model.model, name, linear, quantization)
    return Contents(base, meta_model, quantization)


@pytest.mark.parametrize("family", sampled(FAMILIES, "llama", "gemma2", "phi3"))
def test_the_size_is_known_to_the_byte(tmp_path: Path, family: str) -> None:
    base = aged(make_base(family, tmp_path / "base"))
    for form in (QuantizationSection(), QuantizationSection(double_quant=False)):
        load(base, form)
        foreseen = contents_of(base, form)
        (folder,) = [one for one in kept() if one.name.endswith(foreseen.settings.ending)]
        header = 8 + int.from_bytes((folder / "others.safetensors").read_bytes()[:8], "little")
        manifest = (folder / "manifest.json").stat().st_size
        assert foreseen.kept_bytes == size_of(folder) - manifest - header
        assert foreseen.original_bytes == sum(entry.nbytes for entry in base_at(base).tensors.values())


@pytest.mark.parametrize("family", mixtures.FAMILIES)
def test_the_size_of_a_mixture_too(tmp_path: Path, family: str) -> None:
    base = aged(mixtures.make_base(family, tmp_path / "base"))
    load(base)
    meta_model = build(base_at(base))
    swap_all_linear(meta_model, base_at(base), QuantizationSection())
    foreseen, folder = Contents(base_at(base), meta_model, QuantizationSection()), kept()[0]
    header = 8 + int.from_bytes((folder / "others.safetensors").read_bytes()[:8], "little")
    manifest = (folder / "manifest.json").stat().st_size
    assert foreseen.kept_bytes == size_of(folder) - manifest - header
    assert folder.name.endswith(foreseen.settings.ending)
    several = next(name for name, of_one in meta_model.experts.items() if len(of_one) > 1 or of_one[0].expert is None)
    other = dict(meta_model.experts) | {several: meta_model.experts[several][::-1]}
    changed = Contents(base_at(base), replace(meta_model, experts=other), QuantizationSection()).settings
    assert (changed.ending == foreseen.settings.ending) is (len(other[several]) == 1), "which tensor is which expert"


def test_whatever_decides_the_bytes_is_in_the_folders_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(**form: object) -> str:
        return contents_of(base, QuantizationSection.model_validate(form)).settings.ending

    endings = [ending(), ending(double_quant=False), ending(type="fp4")]
    assert ending() == endings[0]
    monkeypatch.setattr("qlora.model.base_cache.contents.QUANTIZER", 2)
    endings.append(ending())
    monkeypatch.setattr("qlora.model.base_cache.contents.version", lambda library: "0.0")
    endings.append(ending())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert len({*endings}) == 5


def test_another_table_of_names_is_another_form(base: Path) -> None:
    """A later transformers could fill a parameter from another tensor of the same shape."""
    one = contents_of(base, QuantizationSection())
    sources = dict(one.meta_model.sources)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv"]
    sources[names[0]], sources[names[1]] = sources[names[1]], sources[names[0]]
    other = Contents(one.base, type(one.meta_model)(one.meta_model.model, sources, (), ""), one.quantization)
    assert one.settings.structure != other.settings.structure
