"""Keys for transformers 4 beside those of version 5: version 5 reads the same model with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora.export.gguf import rope
from qlora.export.versions import config_for_both, tokenizer_config_for_both
from tests.export.gguf.test_rope import LINEAR, LLAMA3, LONGROPE, YARN
from tests.families import make_base, make_config, make_model

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
    patched = config_for_both(saved)
    flat = parameters.get("full_attention", parameters)
    assert patched["rope_theta"] == flat["rope_theta"]
    scaling = patched["rope_scaling"] or {}
    kind = None if flat["rope_type"] == "default" else flat["rope_type"]
    assert scaling.get("rope_type", scaling.get("type")) == kind
    (tmp_path / "config.json").write_text(json.dumps(patched))
    before, after = (rope.witnesses(make_model(c)) for c in (config, AutoConfig.from_pretrained(tmp_path)))
    assert before.keys() == after.keys()
    for kind, witness in before.items():
        assert witness.attention == after[kind].attention
        assert (witness.frequencies == after[kind].frequencies).all()


def test_what_version_4_has_saved_is_not_touched() -> None:
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "model_type": "llama"}
    assert config_for_both(old) == old
    assert config_for_both({"model_type": "mamba"}) == {"model_type": "mamba"}
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": ["<a>"]}
    assert tokenizer_config_for_both(tokenizer) == tokenizer


def test_the_tokenizer_of_version_5_gets_a_class_that_version_4_knows(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = make_base("llama", tmp_path / "base")
    file = base / "tokenizer_config.json"
    saved = json.loads(file.read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend" and "extra_special_tokens" in saved
    text = "<|im_start|>user\nWhat is the price?<|im_end|>"
    before = AutoTokenizer.from_pretrained(base)
    file.write_text(json.dumps(tokenizer_config_for_both(saved)))
    after = AutoTokenizer.from_pretrained(base)
    assert before(text)["input_ids"] == after(text)["input_ids"]
    assert set(before.all_special_tokens) == set(after.all_special_tokens)
    assert torch.equal(torch.tensor(before(text)["attention_mask"]), torch.tensor(after(text)["attention_mask"]))
