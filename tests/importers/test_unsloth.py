"""Unsloth Studio's configurations, in its own tables."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.importers.cases import assert_all_told, imported, left, recipe_of

FULL = """
model: owner/small-model
data:
  local_dataset: [rows.jsonl]
  format_type: chatml
training:
  training_type: lora
  max_seq_length: 2048
  load_in_4bit: true
  output_dir: outputs
  num_epochs: 0
  learning_rate: 0.0002
  batch_size: 2
  gradient_accumulation_steps: 4
  warmup_steps: 5
  max_steps: 50
  save_steps: 0
  weight_decay: 0.01
  random_seed: 3407
  packing: false
  train_on_completions: true
  gradient_checkpointing: "unsloth"
lora:
  lora_r: 64
  lora_alpha: 16
  lora_dropout: 0.0
  target_modules: "q_proj,k_proj"
  vision_all_linear: false
  use_rslora: false
  use_loftq: true
  finetune_mlp_modules: true
logging:
  enable_wandb: true
  wandb_token: abcdef
"""


def test_every_key_is_carried_or_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    found = imported(tmp_path, FULL)
    recipe = recipe_of(found)
    assert_all_told(found, yaml.safe_load(FULL))
    assert found.trainer == "Unsloth Studio" and recipe.model.base == "owner/small-model"
    assert (recipe.data.train[0].path, recipe.data.train[0].format) == (str(tmp_path / "rows.jsonl"), "messages")
    assert (recipe.train.batch_size, recipe.train.max_steps, recipe.train.warmup_ratio) == (8, 50, 0.1)
    assert recipe.lora.target_modules == ("q_proj", "k_proj") and recipe.train.gradient_checkpointing is True
    assert (recipe.data.loss_on, recipe.data.packing, recipe.train.seed) == ("assistant", False, 3407)
    assert set(left(found)) == {"lora.use_loftq", "logging.wandb_token"}
    assert recipe_of(found).report.sinks[-1] == "wandb"
    assert recipe.data.eval_fraction == 0.0 and any(
        "eval_fraction = 0.0 (not set" in one.said for one in found.accounts
    )
    assert "abcdef" not in str(found.accounts)
