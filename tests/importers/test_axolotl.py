"""axolotl's configurations, in its own keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qlora.errors import UserError
from tests.importers.cases import assert_all_told, imported, left, recipe_of

FULL = """
base_model: owner/small-model
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
chat_template: chatml
datasets:
  - path: owner/chats
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
  - path: rows.jsonl
    ds_type: json
    type: alpaca
  - path: owner/books
    type: completion
    field: chapter
test_datasets:
  - {path: owner/chats, type: chat_template, split: test}
dataset_prepared_path:
val_set_size: 0.0
output_dir: ./outputs/x
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
peft_use_rslora: true
lora_modules_to_save: [embed_tokens, lm_head]
gradient_accumulation_steps: 4
micro_batch_size: 2
max_steps: 200
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
weight_decay: 0.01
bf16: auto
tf32: false
gradient_checkpointing: true
attn_implementation: flash_attention_2
train_on_inputs: false
evals_per_epoch: 4
save_steps: 25
early_stopping_patience: 3
wandb_project: mine
wandb_token: abcdef123
deepspeed: deepspeed_configs/zero2.json
special_tokens: {pad_token: "<|end|>"}
adam_beta2: 0.95
what_is_this: 1
"""


def test_every_key_is_carried_or_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    found = imported(tmp_path, FULL)
    recipe = recipe_of(found)
    assert_all_told(found, yaml.safe_load(FULL))
    assert found.trainer == "axolotl" and recipe.model.base == "owner/small-model"
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.use_rslora) == (32, 16, 0.05, True)
    assert recipe.lora.target_modules == "all-linear" and recipe.lora.modules_to_save == ("embed_tokens", "lm_head")
    train = recipe.train
    assert (train.micro_batch_size, train.batch_size, train.max_steps, train.epochs) == (2, 8, 200, None)
    assert (train.learning_rate, train.warmup_ratio, train.weight_decay) == (2e-4, 0.05, 0.01)
    assert train.optimizer == "paged_adamw_8bit" and train.gradient_checkpointing is True
    assert (recipe.data.max_length, recipe.data.packing, recipe.data.loss_on) == (4096, True, "assistant")
    assert recipe.checkpoint.every_steps == 25 and recipe.eval.early_stopping_patience == 3
    assert recipe.model.chat_template == "chatml" and recipe.quantization.type == "nf4"
    chats, alpaca, books = recipe.data.train
    assert (chats.path, chats.format, chats.columns) == ("hub:owner/chats:train", "sharegpt", {})
    assert (alpaca.path, alpaca.format) == (str(tmp_path / "rows.jsonl"), "alpaca")
    assert (books.path, books.format, books.columns) == ("hub:owner/books", "text", {"text": "chapter"})
    assert [(one.path, one.format) for one in recipe.data.eval] == [("hub:owner/chats:test", "messages")]
    lost = left(found)
    wanted = {"datasets.0.split", "evals_per_epoch", "wandb_project", "wandb_token", "deepspeed", "special_tokens"}
    assert set(lost) == wanted | {"adam_beta2", "what_is_this"}
    assert lost["what_is_this"] == "not known here"
    assert not any("abcdef123" in account.key + account.said for account in found.accounts)


def test_what_it_does_by_default_is_carried_where_it_differs(tmp_path: Path) -> None:
    found = imported(
        tmp_path, "base_model: a/b\nadapter: lora\nlora_r: 8\nlora_alpha: 16\ndatasets: [{path: a/c, type: alpaca}]\n"
    )
    recipe = recipe_of(found)
    assert recipe.quantization.type == "none" and recipe.data.max_length == 512 and recipe.train.epochs == 1.0
    assert not recipe.data.packing and recipe.data.eval_fraction == 0.0
    assert any("not set: its default" in account.said for account in found.of("carried"))


@pytest.mark.parametrize(
    "more", ["rl: ppo", "reward_model: true", "rl: grpo\ntrl: {beta: 0.1}", "ebft: {mode: strided}"]
)
def test_another_goal_is_refused(tmp_path: Path, more: str) -> None:
    with pytest.raises(UserError, match="another goal"):
        imported(tmp_path, f"base_model: a/b\nsequence_len: 512\nadapter: lora\n{more}\n")


@pytest.mark.parametrize(
    ("line", "key", "why"),
    [
        ("optimizer: muon", "optimizer", "not built"),
        ("lr_scheduler: rex", "lr_scheduler", "not built"),
        ("load_in_8bit: true", "load_in_8bit", "8 bit"),
        ("adapter: ", "warmup_steps", "steps are not known"),
        ("lora_r: 0", "lora_r", "not positive"),
        ("lora_r: [1]", "lora_r", "no number"),
        ("lora_dropout: 1.5", "lora.dropout", "not possible here"),
        ("learning_rate: .nan", "learning_rate", "no finite number"),
        ("val_set_size: 2000", "val_set_size", "number of rows"),
        ("torch_dtype: float32", "torch_dtype", "not in fp32"),
        ("early_stopping_patience: 2", "eval.early_stopping_patience", "no rows to evaluate"),
        ("micro_batch_size: none", "micro_batch_size × gradient_accumulation_steps", "no number"),
    ],
)
def test_a_value_that_has_no_counterpart_is_named(tmp_path: Path, line: str, key: str, why: str) -> None:
    found = imported(tmp_path, f"base_model: a/b\nsequence_len: 64\nnum_epochs: 2\nwarmup_steps: 9\n{line}\n")
    recipe_of(found)
    lost = left(found)
    assert any(why in said for name, said in lost.items() if key in name or key in said), lost


SMALL = "base_model: a/b\nsequence_len: 64\n"


@pytest.mark.parametrize(
    ("more", "wanted", "lost"),
    [
        ("[q_proj, v_proj]", "all-linear", False),
        ("[q_proj, lm_head]", "all-linear", True),
        ("[1]", "all-linear", True),
    ],
)
def test_modules_beside_all_linear_take_nothing_from_it(tmp_path: Path, more: str, wanted: str, lost: bool) -> None:
    lines = ["lora_target_linear: true", f"lora_target_modules: {more}"]
    for order in (lines, lines[::-1]):
        found = imported(tmp_path, SMALL + "adapter: lora\n" + "\n".join(order))
        assert recipe_of(found).lora.target_modules == wanted, order
        assert ("lora_target_modules" in left(found)) == lost
    found = imported(tmp_path, f"{SMALL}adapter: lora\nlora_target_linear: false\nlora_target_modules: [q_proj]\n")
    assert recipe_of(found).lora.target_modules == ("q_proj",)


def test_training_of_the_base_itself_is_said_not_to_be_carried(tmp_path: Path) -> None:
    assert "base itself is trained" in left(imported(tmp_path, f"{SMALL}num_epochs: 1\n"))["adapter"]
    assert "adapter" not in left(imported(tmp_path, f"{SMALL}adapter: lora\n"))


@pytest.mark.parametrize(("switch", "kind"), [("load_in_4bit: false", "none"), ("load_in_4bit: true", "fp4")])
def test_the_type_is_read_where_4_bit_is_on(tmp_path: Path, switch: str, kind: str) -> None:
    lines = [switch, "bnb_config_kwargs: {bnb_4bit_quant_type: fp4}"]
    for order in (lines, lines[::-1]):
        found = imported(tmp_path, SMALL + "adapter: lora\n" + "\n".join(order))
        assert recipe_of(found).quantization.type == kind, order
