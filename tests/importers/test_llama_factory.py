"""LLaMA-Factory's configurations, in its own keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qlora.errors import UserError
from tests.importers.cases import assert_all_told, imported, left, recipe_of, told

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


@pytest.mark.parametrize("stage", ["ppo", "rm"])
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


SMALL = "model_name_or_path: a/b\nfinetuning_type: lora\n"


@pytest.mark.parametrize(
    ("lines", "alpha"),
    [("lora_rank: 64", 128.0), ("cutoff_len: 9", 16.0), ("lora_rank: 64\nlora_alpha: 7", 7.0), ("lora_rank: x", None)],
)
def test_alpha_is_twice_the_rank_of_the_configuration(tmp_path: Path, lines: str, alpha: float | None) -> None:
    found = imported(tmp_path, f"{SMALL}stage: sft\n{lines}\n")
    assert found.table.get("lora", {}).get("alpha") == alpha
    assert ("lora_alpha" in left(found)) == (alpha is None)


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (("quantization_bit: 4", "quantization_type: fp4"), "fp4"),
        (("quantization_type: nf4",), "none"),
        (("quantization_bit: 8", "quantization_type: fp4"), "nf4"),
    ],
)
def test_the_type_is_read_where_4_bit_is_on(tmp_path: Path, lines: tuple[str, ...], kind: str) -> None:
    for order in (lines, lines[::-1]):
        found = imported(tmp_path, f"{SMALL}stage: sft\n" + "\n".join(order))
        assert recipe_of(found).quantization.type == kind, order


@pytest.mark.parametrize(
    ("lines", "packs"),
    [
        ("stage: sft", False), ("stage: sft\nneat_packing: true", True), ("stage: pt", True),
        ("stage: sft\npacking: false\nneat_packing: true", True), ("stage: pt\npacking: false", False),
        ("stage: sft\nneat_packing: false", False), ("stage: sft\nneat_packing: false\npacking: true", True),
    ],
)  # fmt: skip
def test_what_packs_there_packs_here(tmp_path: Path, lines: str, packs: bool) -> None:
    found = imported(tmp_path, f"{SMALL}{lines}\n")
    assert recipe_of(found).data.packing is packs and set(yaml.safe_load(lines)) <= told(found)


def test_rows_to_evaluate_on_are_of_the_same_list(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "dataset_info.json").write_text(json.dumps(LIST))
    lines = "stage: sft\ndataset_dir: lists\ndataset: names\neval_dataset: chats\n"
    found = imported(tmp_path, SMALL + lines)
    assert [one.path for one in recipe_of(found).data.eval] == [str(tmp_path / "lists" / "chats.json")]
    assert "eval_dataset" not in left(found)
