"""TRL's SFTConfig and script arguments, as JSON and as YAML."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest

from tests.importers.cases import assert_all_told, imported, left, recipe_of, told

KEYS = {
    "model_name_or_path": "owner/small-model",
    "dataset_name": "owner/rows",
    "dataset_train_split": "train_sft",
    "dataset_config": "plain",
    "use_peft": True,
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "lora_r": 8,
    "lora_target_modules": "all-linear",
    "max_length": 512,
    "packing": True,
    "assistant_only_loss": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.1,
    "num_train_epochs": 1,
    "max_steps": -1,
    "neftune_noise_alpha": 5,
    "optim": "adamw_8bit",
    "push_to_hub": False,
    "hub_token": "hf_abcdefghijklmnopqrst",
    "report_to": ["wandb"],
    "deepspeed": None,
    "label_names": ["x"],
}


def test_every_key_is_carried_or_named(tmp_path: Path) -> None:
    found = imported(tmp_path, json.dumps(KEYS), "sft_config.json")
    recipe = recipe_of(found)
    assert_all_told(found, KEYS)
    assert found.trainer == "TRL" and recipe.data.train[0].path == "hub:owner/rows:train_sft"
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 32, 0.05)
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.train.max_steps) == (16, 1.0, None)
    assert (recipe.train.lr_scheduler, recipe.train.neftune_alpha) == ("constant", 5.0)
    assert recipe.data.loss_on == "assistant" and recipe.quantization.double_quant
    assert set(left(found)) == {"dataset_config", "hub_token", "label_names"}
    assert recipe.report.sinks == ("console", "jsonl", "html", "wandb")
    assert not any("abcdefghijkl" in account.key for account in found.accounts)


def test_by_default_it_trains_every_token_of_a_chat_in_16_bit(tmp_path: Path) -> None:
    found = imported(tmp_path, "model_name_or_path: a/b\ndataset_name: a/c\nmax_length: 99\n")
    recipe = recipe_of(found)
    assert (recipe.data.loss_on, recipe.quantization.type, recipe.data.truncation) == ("all", "none", "cut")
    assert recipe.train.learning_rate == 2e-5


SMALL = "model_name_or_path: a/b\ndataset_name: a/c\nuse_peft: true\n"


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (("load_in_4bit: false", "bnb_4bit_quant_type: nf4"), "none"),
        (("load_in_4bit: true", "bnb_4bit_quant_type: fp4"), "fp4"),
        (("bnb_4bit_quant_type: fp4",), "none"),
        (("load_in_8bit: true", "bnb_4bit_quant_type: fp4"), "nf4"),
        (("load_in_8bit: true", "load_in_4bit: true", "bnb_4bit_quant_type: fp4"), "fp4"),
    ],
)
def test_the_type_is_read_where_4_bit_is_on(tmp_path: Path, lines: tuple[str, ...], kind: str) -> None:
    for order in permutations(lines):
        found = imported(tmp_path, SMALL + "max_length: 9\n" + "\n".join(order))
        assert recipe_of(found).quantization.type == kind, order
        assert {line.partition(":")[0] for line in lines} <= told(found)


def test_no_rows_are_held_out_where_none_are_there(tmp_path: Path) -> None:
    found = imported(tmp_path, SMALL)
    assert recipe_of(found).data.eval_fraction == 0.0
    assert any("data.eval_fraction = 0.0 (not set" in account.said for account in found.of("carried"))


def test_what_is_trained_there_and_not_here_is_said(tmp_path: Path) -> None:
    lost = left(imported(tmp_path, "model_name_or_path: a/b\ndataset_name: a/c\nmax_length: 9\n"))
    assert "completion alone is trained" in lost.pop("completion_only_loss")
    assert "base itself is trained" in lost["use_peft"] and "lora_target_modules" not in lost
    lost = left(imported(tmp_path, SMALL))
    assert "q_proj and v_proj" in lost["lora_target_modules"] and "use_peft" not in lost
    rest = left(imported(tmp_path, SMALL + "lora_target_modules: [q_proj]\n"))
    assert set(rest) == {"completion_only_loss"}


@pytest.mark.parametrize(
    ("lines", "loss_on", "unsaid"),
    [
        ("", "all", True),  # by the rows: completions alone, or all of a chat
        ("completion_only_loss: null", "all", True),
        ("completion_only_loss: false", "all", False),
        ("completion_only_loss: true", "assistant", False),
        ("assistant_only_loss: true", "assistant", False),
        ("assistant_only_loss: false", "all", True),
        ("assistant_only_loss: true\ncompletion_only_loss: false", "assistant", False),
    ],
)
def test_what_is_trained_of_which_rows(tmp_path: Path, lines: str, loss_on: str, unsaid: bool) -> None:
    found = imported(tmp_path, SMALL + lines)
    assert recipe_of(found).data.loss_on == loss_on
    assert ("completion_only_loss" in left(found)) is unsaid
    whole = [account.said for account in found.of("carried") if account.key == "completion_only_loss"]
    assert whole == [] or "chats are trained whole there" in whole[0]


def test_rows_without_a_limit_are_said_to_have_one_here(tmp_path: Path) -> None:
    found = imported(tmp_path, SMALL + "max_length: null\n")
    assert "no row is cut there" in left(found)["max_length"] and "max_length" not in found.table["data"]
    assert recipe_of(imported(tmp_path, SMALL)).data.max_length == 1024
