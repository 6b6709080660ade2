"""The folder of a merged model: the base's own files, patched only where merging changes something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora.events import Notice, Progress, Recorder
from qlora.export import hf
from qlora.export.staging import StagedExport
from qlora.model.tensors import find_tensors
from tests.export.test_merge import KINDS, merge_of, of_peft, opened, trained
from tests.families import as_version_4_saves, make_base, make_tokenizer


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def test_filled_but_not_published(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    merge = merge_of(llama, tmp_path / "adapter", dtype=torch.bfloat16)
    sink = Recorder()
    with StagedExport.open({"hf": tmp_path / "out"}, merge.identity(), hf.planned_bytes(merge)) as workshop:
        count = hf.fill(merge, workshop, sink)
        written = find_tensors(workshop.folder("hf"))
        assert not (tmp_path / "out").exists()
    assert count == len(written) == len(merge.tensors())
    assert sum(entry.nbytes for entry in written.values()) == hf.planned_bytes(merge)
    progress = [event for event in sink.events if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total == hf.planned_bytes(merge)
    assert not list(tmp_path.glob(".out*"))


def test_shards_are_as_large_as_they_may_be(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 60_000)
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    hf.write(merge_of(llama, tmp_path / "adapter", dtype=torch.bfloat16), tmp_path / "out", Recorder())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in find_tensors(tmp_path / "out").values())
    for shard in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 60_000


def test_only_the_changed_keys_of_the_config_change(tmp_path: Path) -> None:
    base = as_version_4_saves(make_base("qwen2", tmp_path / "base"))
    written = json.dumps({**config_of(base), "of_the_publisher": [1, 2], "dtype": "float32"}, indent=7)
    (base / "config.json").write_text(written)
    of_peft(base, tmp_path / "adapter")
    hf.write(merge_of(base, tmp_path / "adapter"), tmp_path / "same", Recorder())
    assert (tmp_path / "same" / "config.json").read_text() == written
    hf.write(merge_of(base, tmp_path / "adapter", dtype=torch.float16), tmp_path / "half", Recorder())
    assert config_of(tmp_path / "half") == {**json.loads(written), "dtype": "float16"}


def test_the_bases_own_companions_come_along(tmp_path: Path) -> None:
    base = as_version_4_saves(make_base("llama", tmp_path / "base"))
    (base / "LICENSE").write_text("of the base")
    (base / "modeling_own.py").write_text("raise SystemExit")
    of_peft(base, tmp_path / "adapter")
    hf.write(merge_of(base, tmp_path / "adapter"), tmp_path / "out", Recorder())
    for name in ("LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_own.py").exists()


def test_what_version_5_alone_reads_is_said_for_version_4_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rope = {"rope_type": "linear", "rope_theta": 250000.0, "factor": 2.0}
    base = make_base("llama", tmp_path / "base", overrides={"rope_parameters": rope})
    of_peft(base, tmp_path / "adapter")
    hf.write(merge_of(base, tmp_path / "adapter"), tmp_path / "out", Recorder())
    config = config_of(tmp_path / "out")
    assert config["rope_theta"] == 250000.0 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == rope
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.rope_parameters == rope
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


@pytest.mark.parametrize("tie", [False, True])
def test_new_tokens_are_in_the_written_tokenizer(tmp_path: Path, tie: bool) -> None:
    from transformers import AutoTokenizer

    base = make_base("llama", tmp_path / "base", tie=tie)
    of_peft(base, tmp_path / "adapter", resize=386)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|call|>", "<|result|>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    hf.write(merge_of(base, tmp_path / "adapter"), tmp_path / "out", Recorder())
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").encode("<|call|>", add_special_tokens=False)
    assert ids == [len(tokenizer) - 2]
    model = opened(tmp_path / "out", torch.float32)
    assert model.config.vocab_size == 386 and model.get_output_embeddings().weight.shape == (386, 64)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tie


def test_a_resized_vocabulary_without_a_tokenizer_is_told(tmp_path: Path, llama: Path) -> None:
    of_peft(llama, tmp_path / "adapter", resize=390)
    sink = Recorder()
    hf.write(merge_of(llama, tmp_path / "adapter"), tmp_path / "out", sink)
    assert [event.message for event in sink.events if isinstance(event, Notice) and "no tokenizer" in event.message]


def test_the_card_says_what_was_merged_and_holds_what_is_added(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    (tmp_path / "adapter" / "README.md").write_text("---\nlibrary_name: peft\n---\n# Trained on lamps\n")
    merge = merge_of(llama, tmp_path / "adapter")
    text = hf.card(merge, "## Fidelity\n\n| a | b |")
    assert "its original weights, and 14 trained modules" in text
    assert text.index("## Fidelity") < text.index("# Trained on lamps") and "library_name: peft" not in text
    assert "Fidelity" not in hf.card(merge)
