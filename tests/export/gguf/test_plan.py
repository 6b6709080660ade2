"""What must hold before a GGUF file is written is found without reading a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.gguf.plan import Tokens, plan
from qlora.model.resolve import resolve
from qlora.model.tokenizer_files import read_files
from tests.export.cases import KINDS, export, trained


def test_k_quants_without_their_encoder_are_refused_at_once(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    monkeypatch.setattr("qlora.export.llama_cpp.library._PLACES", ())
    with pytest.raises(ExportError, match="neither xllamacpp nor llama-cpp-python") as caught:
        export(tmp_path / "adapter", "gguf", quants=("q4_k_m",), out=tmp_path / "out")
    assert 'pip install "qlora[gguf]"' in caught.value.hint and not list(tmp_path.glob("*out*"))


def test_an_unknown_pre_tokenizer_is_refused_and_can_be_named(tmp_path: Path, llama: Path) -> None:
    import shutil

    shutil.copytree(llama, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": "[a-z]{1,7}"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    trained(tmp_path / "base", tmp_path / "adapter", KINDS["plain"])
    with pytest.raises(ExportError, match=r"\[a-z\]") as caught:
        export(tmp_path / "adapter", "gguf", out=tmp_path / "out")
    assert "`tokenizer_pre`" in caught.value.hint
    report = export(tmp_path / "adapter", "gguf", out=tmp_path / "out", tokenizer_pre="gpt-2", verify=False)
    reader = gguf.GGUFReader(next(report.folder.glob("*.gguf")))
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_a_base_is_planned_by_its_own_shapes_and_without_ggml_where_no_quant_needs_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.export.llama_cpp.library._PLACES", ())
    base = resolve(str(llama), "main", Recorder())
    planned = plan(base, None, Tokens(), ("f16", "q8_0"))
    assert planned.library is None and list(planned.choices) == ["f16", "q8_0"]
    shapes = {tensor.parameter: tensor.shape for tensor in planned.layout.tensors}
    assert shapes == {name: entry.shape for name, entry in base.tensors.items()}
    with pytest.raises(ExportError, match="neither xllamacpp"):
        plan(base, None, Tokens(), ("f16", "q4_k_m"))


def test_the_tokenizer_of_the_training_is_read_and_the_ends_of_the_base(llama: Path, tmp_path: Path) -> None:
    base = resolve(str(llama), "main", Recorder())
    own = plan(base, None, Tokens(), ("f16",)).vocab
    assert plan(base, None, Tokens(template="{{ messages }}"), ("f16",)).vocab.chat_template == "{{ messages }}"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    top = 1 + max(token["id"] for token in content["added_tokens"])
    used = {*content["model"]["vocab"].values(), *range(top)}
    free = next(number for number in range(384) if number not in used)
    content["added_tokens"].append({**content["added_tokens"][0], "id": free, "content": "<|call|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    trained_with = plan(base, None, Tokens(read_files(tmp_path)), ("f16",)).vocab
    assert "<|call|>" in trained_with.tokens and "<|call|>" not in own.tokens
