"""Adapters as peft saves them, every kind: read, merged, and compared with what peft itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.events import Recorder
from tests.export.cases import logits, merge_of, of_peft, opened, whole
from tests.export.hf_folder import write_hf
from tests.families import make_base

BOTH = ["q_proj", "embed_tokens", "lm_head"]
PEFT_KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "fan_in_fan_out": {"fan_in_fan_out": True},  # peft sets it aside for nn.Linear
    "norms and head whole": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings whole": {"modules_to_save": ["embed_tokens"]},
    "embedding lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding dora": {"target_modules": BOTH, "use_dora": True},
    "head lora": {"target_modules": ["q_proj", "lm_head"]},
    "both lora": {"target_modules": BOTH},
    "token rows": {"trainable_token_indices": [3, 5, 200]},
    "token rows apart": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [1]}},
    "kept together: lora": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "kept together: whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "resized": {"resize": 390},
    "resized and trained": {"resize": 390, "modules_to_save": ["embed_tokens", "lm_head"]},
    "resized and rows": {"resize": 390, "trainable_token_indices": [3, 385]},
    "resized and lora": {"resize": 390, "target_modules": BOTH},
    "smaller": {"resize": 300},
}
# What leaves a tied head with its embeddings. (peft's own merge adds to the shared weight, and its result is not the
# model that was trained, wherever only one of the two was.)
TOGETHER = ("plain", "kept together", "token rows", "resized", "smaller", "fan_in", "rslora", "dora", "patterns")


@pytest.mark.parametrize("tie", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", PEFT_KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_sum_is_pefts_own(tmp_path: Path, kind: str, tie: bool) -> None:
    """Tensor by tensor what peft merges, and as a model what peft computes without merging."""
    base = make_base("llama", tmp_path / "base", tie=tie, dtype=torch.float32)
    model = of_peft(base, tmp_path / "adapter", **PEFT_KINDS[kind])
    merge = merge_of(base, tmp_path / "adapter")
    expected = logits(model)
    write_hf(merge, tmp_path / "out", Recorder())
    merged = opened(tmp_path / "out", torch.float32)
    assert torch.allclose(logits(merged), expected, atol=2e-5, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stays = kind.startswith(TOGETHER) and kind not in ("token rows apart", "resized and trained", "resized and lora")
    assert config["tie_word_embeddings"] is (tie and stays)
    assert config["vocab_size"] == PEFT_KINDS[kind].get("resize", 384)
    if not tie or (stays and kind != "kept together: lora"):  # there peft's merge adds the product twice
        theirs = model.merge_and_unload().state_dict()
        ours = {tensor.parameter: whole(tensor) for tensor in merge.tensors()}
        assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if tie else set())
        for name, tensor in ours.items():
            assert float((tensor - theirs[name]).abs().max()) < 1e-6, name


@pytest.mark.parametrize("kind", ["plain", "dora", "embedding dora", "head lora", "token rows", "resized"])
@pytest.mark.filterwarnings("ignore")
def test_the_changed_parameters_are_those_whose_values_differ(tmp_path: Path, llama: Path, kind: str) -> None:
    of_peft(llama, tmp_path / "adapter", **PEFT_KINDS[kind])
    merge = merge_of(llama, tmp_path / "adapter")
    before = {tensor.parameter: whole(tensor) for tensor in merge.base_tensors()}
    changed = []
    for tensor in merge.tensors():
        after, old = whole(tensor), before[tensor.parameter]
        changed += [] if torch.equal(after, old) else [tensor.parameter]
    assert set(merge.changed) == set(changed) and changed


def test_names_with_an_adapters_name_in_them(tmp_path: Path, llama: Path) -> None:
    """As a state dict that was saved without peft's help has them."""
    of_peft(llama, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge = merge_of(llama, tmp_path / "adapter")
    expected = {tensor.parameter: whole(tensor) for tensor in merge.tensors()}
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    longer = {"lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight"}
    longer["lm_head.weight"] = "lm_head.modules_to_save.default.weight"
    tensors = load_file(file)
    for short, long in longer.items():
        tensors = {name.replace(short, long): tensor for name, tensor in tensors.items()}
    assert all("default" in name for name in tensors)
    save_file(tensors, file)
    again = merge_of(llama, tmp_path / "adapter")
    assert all(torch.equal(whole(tensor), expected[tensor.parameter]) for tensor in again.tensors())
