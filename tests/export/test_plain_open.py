"""What plain transformers would not open, or would open as another model, is found before an export has its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora.errors import ExportError
from qlora.export import hf
from qlora.export.verify.plain_open import opens
from tests.export.cases import KINDS, edit, export, trained
from tests.families import make_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_base("gemma3", tmp_path / "base")


def change(folder: Path, old: str, new: str | None) -> None:
    """Give a weight another name, or take it out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    moved = tensors.pop(old)
    save_file({**tensors, **({new: moved} if new else {})}, file, metadata={"format": "pt"})


def test_a_folder_opens_as_its_own_class(folder: Path) -> None:
    assert opens(folder) == ("opens in transformers", True, "as Gemma3ForCausalLM")


def test_experts_in_mxfp4_open_without_kernels_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from tests.mxfp4 import make_base as make_mxfp4

    base, asked, plainly = make_mxfp4(tmp_path / "base"), [], AutoModelForCausalLM.from_pretrained

    def opened(folder: Path, **how: object) -> object:
        asked.append(how["quantization_config"].dequantize)  # type: ignore[attr-defined]
        return plainly(folder, **how)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", opened)
    assert opens(base) == ("opens in transformers", True, "as GptOssForCausalLM") and asked == [True]
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.0.mlp.experts.down_proj_bias")
    save_file(tensors, file, metadata={"format": "pt"})
    assert not opens(base)[1]


def test_names_that_nothing_reads_and_weights_that_are_missing_are_named(folder: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    change(folder, name, name.replace("q_proj", "query"))
    _, ok, detail = opens(folder)
    assert not ok and f"{name} is missing" in detail and "self_attn.query.weight is read by nothing" in detail


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"hidden_size": 96}),
        ("config.json", {"model_type": "gemma9"}),
        ("tokenizer_config.json", {"tokenizer_class": "NoSuchTokenizer", "auto_map": {"AutoTokenizer": [None, "x.Y"]}}),
    ],
)
def test_what_transformers_does_not_open_is_said(folder: Path, file: str, changes: dict[str, object]) -> None:
    edit(folder / file, **changes)
    if file == "tokenizer_config.json":
        (folder / "tokenizer.json").unlink()
    _, ok, detail = opens(folder)
    assert not ok and detail.startswith("it does not: ")


def test_an_export_that_does_not_open_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is a process of its own: the writer is broken here, and its reader there finds it."""
    base = make_base("llama", tmp_path / "base")
    trained(base, tmp_path / "adapter", KINDS["some"])
    real = hf.patched_config

    def broken(merge):  # type: ignore[no-untyped-def]
        return json.dumps({**json.loads(real(merge)), "num_attention_heads": "four"})

    monkeypatch.setattr(hf, "patched_config", broken)
    monkeypatch.setattr("qlora.export.verify.weights.patched_config", broken)
    with pytest.raises(ExportError, match="opens in transformers: it does not"):
        export(tmp_path / "adapter", "hf", out=tmp_path / "out", merge_base="nf4")
    assert not (tmp_path / "out").exists()
