"""LLaMA-Factory's configurations, in its own keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qlora.errors import UserError
from tests.importers.cases import assert_all_told, imported, left, recipe_of

FULL = """
### model
model_name_or_path: owner/small-model
quantization_bit: 4
double_quantization: false
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: names,chats,elsewhere,owner/on-hub
dataset_dir: lists
template: qwen3_nothink
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
LIST = {
    "names": {"file_name": "names.json"},
    "chats": {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
}


def test_every_key_is_carried_or_named(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "dataset_info.json").write_text(json.dumps(LIST))
    found = imported(tmp_path, FULL)
    recipe = recipe_of(found)
    assert_all_told(found, yaml.safe_load(FULL))
    assert found.trainer == "LLaMA-Factory"
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.target_modules) == (8, 16.0, "all-linear")
    assert (recipe.quantization.type, recipe.quantization.double_quant) == ("nf4", False)
    assert (recipe.train.micro_batch_size, recipe.train.batch_size, recipe.train.epochs) == (1, 8, 3.0)
    assert (recipe.data.max_length, recipe.data.truncation, recipe.data.packing) == (1024, "cut", False)
    assert (recipe.train.optimizer, recipe.data.loss_on, recipe.eval.every_steps) == ("adamw", "assistant", 500)
    names, chats, hub = recipe.data.train
    assert (names.path, names.format) == (str(tmp_path / "lists" / "names.json"), "alpaca")
    assert (chats.format, chats.columns) == ("messages", {"messages": "dialog"})
    assert hub.path == "hub:owner/on-hub"
    assert set(left(found)) == {"trust_remote_code", "template", "max_samples", "dataset", "dataset.chats.columns"}


def test_sixteen_bit_is_what_no_bits_mean(tmp_path: Path) -> None:
    found = imported(tmp_path, "model_name_or_path: a/b\nstage: pt\nfinetuning_type: lora\nlora_rank: 4\n")
    assert recipe_of(found).quantization.type == "none" and recipe_of(found).data.loss_on == "all"


@pytest.mark.parametrize("stage", ["dpo", "ppo", "kto", "rm"])
def test_another_goal_is_refused(tmp_path: Path, stage: str) -> None:
    with pytest.raises(UserError, match="another goal"):
        imported(tmp_path, f"model_name_or_path: a/b\nstage: {stage}\nfinetuning_type: lora\ncutoff_len: 9\n")


def test_a_list_that_leads_out_of_its_folder_brings_nothing_along(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "../../etc/passwd"}}))
    found = imported(tmp_path, "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ndataset: x\n")
    assert "dataset.x.path" in left(found)
    (tmp_path / "data" / "dataset_info.json").write_text("{" * 99)
    again = imported(tmp_path, "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ndataset: x\n")
    assert {"dataset_dir", "dataset"} <= set(left(again))
