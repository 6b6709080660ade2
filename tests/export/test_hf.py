"""The folder of a merged model: the base's own files, patched only where merging changes something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from qlora.errors import ExportError
from qlora.events import Notice, Progress, Recorder
from qlora.export import hf
from qlora.export.gguf import rope
from qlora.export.staging import StagedExport
from qlora.model.tensors import find_tensors
from tests.export.cases import KINDS, merge_of, of_peft, opened, trained
from tests.export.gguf.cases import LINEAR, LLAMA3, LONGROPE, YARN
from tests.export.hf_folder import write_hf
from tests.families import as_version_4_saves, make_base, make_config, make_model, make_tokenizer


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
    write_hf(merge_of(llama, tmp_path / "adapter", dtype=torch.bfloat16), tmp_path / "out", Recorder())
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
    write_hf(merge_of(base, tmp_path / "adapter"), tmp_path / "same", Recorder())
    assert (tmp_path / "same" / "config.json").read_text() == written
    write_hf(merge_of(base, tmp_path / "adapter", dtype=torch.float16), tmp_path / "half", Recorder())
    assert config_of(tmp_path / "half") == {**json.loads(written), "dtype": "float16"}


@pytest.mark.parametrize(
    ("named", "stays"), [("/home/lovelace/tiny", False), ("C:\\lovelace\\tiny", False), ("meta/tiny", True), ("", True)]
)
def test_a_note_of_where_the_base_lay_is_left_out_and_a_hub_name_stays(tmp_path: Path, named: str, stays: bool) -> None:
    """As transformers 4 wrote it into both files."""
    base = as_version_4_saves(make_base("llama", tmp_path / "base"))
    keys = {"config.json": "_name_or_path", "tokenizer_config.json": "name_or_path"}
    for file, key in keys.items():
        (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), key: named}, indent=7))
    of_peft(base, tmp_path / "adapter")
    write_hf(merge_of(base, tmp_path / "adapter", dtype=torch.bfloat16), tmp_path / "out", Recorder())
    for file, key in keys.items():
        written, original = (tmp_path / "out" / file).read_text(), (base / file).read_text()
        assert (written == original) is stays
        assert {key: named, **json.loads(written)} == json.loads(original) and (key in json.loads(written)) is stays


def test_the_bases_own_companions_come_along(tmp_path: Path) -> None:
    base = as_version_4_saves(make_base("llama", tmp_path / "base"))
    (base / "LICENSE").write_text("of the base")
    (base / "modeling_own.py").write_text("raise SystemExit")
    of_peft(base, tmp_path / "adapter")
    write_hf(merge_of(base, tmp_path / "adapter"), tmp_path / "out", Recorder())
    for name in ("LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_own.py").exists()


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "generation_config.json"])
def test_what_is_copied_of_a_base_is_no_link_out_of_it(tmp_path: Path, llama: Path, name: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    of_peft(base, tmp_path / "adapter")
    merge = merge_of(base, tmp_path / "adapter")
    (tmp_path / "secret").write_text("a secret of this machine")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match=f"{name} is not copied into an export: .* is a link out of the folder"):
        write_hf(merge, tmp_path / "out", Recorder())


@pytest.mark.parametrize("value", ["2", True, [1, "2"], {"a": 1}, [3] * 1_001, 1.5])
def test_end_tokens_that_are_none_are_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ExportError, match="eos_token_id is wrong"):
        hf.add_stop_token(tmp_path, [3], Recorder())


def test_what_version_5_alone_reads_is_said_for_version_4_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rope = {"rope_type": "linear", "rope_theta": 250000.0, "factor": 2.0}
    base = make_base("llama", tmp_path / "base", overrides={"rope_parameters": rope})
    of_peft(base, tmp_path / "adapter")
    write_hf(merge_of(base, tmp_path / "adapter"), tmp_path / "out", Recorder())
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
    write_hf(merge_of(base, tmp_path / "adapter"), tmp_path / "out", Recorder())
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").encode("<|call|>", add_special_tokens=False)
    assert ids == [len(tokenizer) - 2]
    model = opened(tmp_path / "out", torch.float32)
    assert model.config.vocab_size == 386 and model.get_output_embeddings().weight.shape == (386, 64)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tie


def test_a_resized_vocabulary_without_a_tokenizer_is_told(tmp_path: Path, llama: Path) -> None:
    of_peft(llama, tmp_path / "adapter", resize=390)
    sink = Recorder()
    write_hf(merge_of(llama, tmp_path / "adapter"), tmp_path / "out", sink)
    assert [event.message for event in sink.events if isinstance(event, Notice) and "no tokenizer" in event.message]


# --- keys for transformers 4 beside those of version 5 ----------------------------------------------------------------

TWO = {
    "full_attention": {**LINEAR, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
CASES = [
    ("llama", {"rope_type": "default", "rope_theta": 250000.0}, {}),
    ("llama", LLAMA3, {}),
    ("qwen3", YARN, {}),
    ("gemma3", TWO, {}),
    ("phi3", {**LONGROPE, "original_max_position_embeddings": 128}, {"original_max_position_embeddings": 128}),
    ("phi3", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}, {}),
]


@pytest.mark.parametrize(("family", "parameters", "more"), CASES)
def test_version_5_reads_the_same_positions(
    tmp_path: Path, family: str, parameters: dict[str, Any], more: dict[str, Any]
) -> None:
    config = make_config(family, overrides={"rope_parameters": parameters, **more})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in saved
    patched = hf.config_for_both(saved)
    flat = parameters.get("full_attention", parameters)
    assert patched["rope_theta"] == flat["rope_theta"]
    scaling = patched["rope_scaling"] or {}
    kind = None if flat["rope_type"] == "default" else flat["rope_type"]
    assert scaling.get("rope_type", scaling.get("type")) == kind
    (tmp_path / "config.json").write_text(json.dumps(patched))
    before, after = (rope.reference_ropes(make_model(c)) for c in (config, AutoConfig.from_pretrained(tmp_path)))
    assert before.keys() == after.keys()
    for kind, own in before.items():
        assert own.attention == after[kind].attention
        assert (own.frequencies == after[kind].frequencies).all()


def test_what_version_4_has_saved_is_not_touched() -> None:
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "model_type": "llama"}
    assert hf.config_for_both(old) == old
    assert hf.config_for_both({"model_type": "mamba"}) == {"model_type": "mamba"}
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": ["<a>"]}
    assert hf.tokenizer_config_for_both(tokenizer) == tokenizer


def test_the_tokenizer_of_version_5_gets_a_class_that_version_4_knows(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = make_base("llama", tmp_path / "base")
    file = base / "tokenizer_config.json"
    saved = json.loads(file.read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend" and "extra_special_tokens" in saved
    text = "<|im_start|>user\nWhat is the price?<|im_end|>"
    before = AutoTokenizer.from_pretrained(base)
    file.write_text(json.dumps(hf.tokenizer_config_for_both(saved)))
    after = AutoTokenizer.from_pretrained(base)
    assert before(text)["input_ids"] == after(text)["input_ids"]
    assert set(before.all_special_tokens) == set(after.all_special_tokens)
    assert torch.equal(torch.tensor(before(text)["attention_mask"]), torch.tensor(after(text)["attention_mask"]))
