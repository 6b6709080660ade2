"""Goals of preference of each trainer: objective, strength and weights by our keys, and rows that are really read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.data.column_words import renamed
from qlora.data.judged import to_judged
from qlora.errors import UserError
from qlora.importers import preferences
from tests.importers.cases import assert_all_told, draft, imported, left, recipe_of

AXOLOTL = "base_model: a/b\nadapter: qlora\nsequence_len: 512\nlearning_rate: 1.0e-5\nmicro_batch_size: 2\n"
FACTORY = "model_name_or_path: a/b\nfinetuning_type: lora\nlora_rank: 8\ntemplate: llama3\ncutoff_len: 2048\n"
TRL = "dataset_name: a/c\nmodel_name_or_path: a/b\nuse_peft: true\nmax_length: 700\nper_device_train_batch_size: 4\n"
NAMES = ("objective", "beta", "label_smoothing", "sft_weight", "simpo_gamma", "desirable_weight", "undesirable_weight")


@pytest.mark.parametrize(
    ("base", "lines", "keys", "lost"),
    [
        (AXOLOTL, "rl: dpo\nrl_beta: 0.3\ndpo_label_smoothing: 0.1\nrpo_alpha: 1.0",
         {"objective": "dpo", "beta": 0.3, "label_smoothing": 0.1, "sft_weight": 1.0}, set()),
        (AXOLOTL, "rl: dpo\ndpo_loss_type: [ipo]\ndpo_beta: 0.2", {"objective": "ipo", "beta": 0.2}, set()),
        (AXOLOTL, "rl: ipo\ntrl: {beta: 0.4, num_generations: 4}", {"objective": "ipo", "beta": 0.4},
         {"trl.num_generations"}),
        (AXOLOTL, "rl: orpo\norpo_alpha: 0.25\nremove_unused_columns: false", {"objective": "orpo", "beta": 0.25},
         {"rl"}),
        (AXOLOTL, "rl: simpo\nrl_beta: 2.5\nsimpo_gamma: 1.25\ncpo_alpha: 0.0",
         {"objective": "simpo", "beta": 2.5, "simpo_gamma": 1.25, "sft_weight": 0.0}, set()),
        (AXOLOTL, "rl: simpo", {"objective": "simpo", "beta": 0.1, "simpo_gamma": 0.5, "sft_weight": 1.0}, set()),
        (AXOLOTL, "rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\ntrain_on_inputs: true",
         {"objective": "kto", "beta": 0.5, "desirable_weight": 0.2}, set()),
        (AXOLOTL, "rl: false\nrl_beta: 0.5", {"objective": "sft"}, set()),
        (FACTORY, "stage: dpo\npref_beta: 0.2\npref_loss: sigmoid\npref_ftx: 0.5\ndpo_label_smoothing: 0.1",
         {"objective": "dpo", "beta": 0.2, "sft_weight": 0.5, "label_smoothing": 0.1}, {"template"}),
        (FACTORY, "stage: dpo\npref_loss: orpo\npref_ftx: 0.5", {"objective": "orpo", "beta": 0.1, "sft_weight": 1.5},
         {"template"}),
        (FACTORY, "stage: dpo\npref_loss: simpo\nsimpo_gamma: 1.5\npref_beta: 2.5",
         {"objective": "simpo", "beta": 2.5, "simpo_gamma": 1.5}, {"template"}),
        (FACTORY, "stage: kto\nkto_chosen_weight: 1.5\nkto_rejected_weight: 0.5\npref_ftx: 1.0\ntrain_on_prompt: true",
         {"objective": "kto", "beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.5},
         {"template", "pref_ftx"}),
        (FACTORY, "stage: sft\npref_beta: 0.2\nsimpo_gamma: 1.0\nkto_chosen_weight: 2.0", {"objective": "sft"},
         {"template"}),
        (TRL, "loss_type: sigmoid\nlabel_smoothing: 0.1\nf_divergence_type: reverse_kl",
         {"objective": "dpo", "beta": 0.1, "label_smoothing": 0.1}, set()),
        (TRL, "loss_type: [ipo]\nbeta: 0.05\nprecompute_ref_log_probs: true",
         {"objective": "ipo", "beta": 0.05}, set()),
        (TRL, "precompute_ref_log_probs: true", {"objective": "dpo", "beta": 0.1}, set()),
        (TRL, "undesirable_weight: 1.3\nbeta: 0.2",
         {"objective": "kto", "beta": 0.2, "undesirable_weight": 1.3}, set()),
        (TRL, "beta: 0.2\nis_encoder_decoder: false", {"objective": "orpo", "beta": 0.2}, {"beta"}),
        (TRL, "loss_type: simpo\nbeta: 2.0\nsimpo_gamma: 1.0\ncpo_alpha: 0",
         {"objective": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "sft_weight": 0.0}, set()),
        (TRL, "loss_type: nll\nassistant_only_loss: true", {"objective": "sft"}, set()),
    ],
)  # fmt: skip
def test_what_each_trainer_asks_for_is_ours(
    tmp_path: Path, base: str, lines: str, keys: dict[str, Any], lost: set[str]
) -> None:
    found = imported(tmp_path, f"{base}{lines}\n")
    recipe, table = recipe_of(found), found.table["train"]
    assert {name: table[name] for name in NAMES if name in table} == ({} if keys == {"objective": "sft"} else keys)
    assert recipe.train.objective == keys["objective"] and recipe.data.loss_on == "assistant"
    assert set(left(found)) - {"lora_target_modules"} == lost
    assert_all_told(found, dict.fromkeys(line.partition(":")[0] for line in (base + lines).splitlines()))


@pytest.mark.parametrize(
    ("base", "lines", "words"),
    [
        (AXOLOTL, "rl: grpo", "rl = grpo"),
        (AXOLOTL, "rl: dpo\ndpo_loss_type: [sigmoid, sft]", "dpo_loss_type"),
        (FACTORY, "stage: rm", "stage = rm"),
        (FACTORY, "stage: ppo", "stage = ppo"),
        (FACTORY, "stage: dpo\npref_loss: hinge", "pref_loss = hinge"),
        (TRL, "loss_type: robust", "loss_type = robust"),
        (TRL, "loss_type: apo_zero_unpaired\ndesirable_weight: 1.0", "apo_zero_unpaired"),
        (TRL, "loss_type: sigmoid\ncpo_alpha: 1.0", "cpo_alpha"),
        (TRL, "beta: 0.0\nnum_generations: 8", "num_generations"),
        (TRL, "loss_type: sigmoid\nf_divergence_type: js_divergence", "f_divergence_type"),
        (TRL, "beta: 0.1", "which one this is for"),
    ],
)
def test_no_other_goal_becomes_one_of_ours(tmp_path: Path, base: str, lines: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        imported(tmp_path, f"{base}{lines}\n")


def test_trls_rate_of_preference_is_not_that_of_imitation(tmp_path: Path) -> None:
    assert recipe_of(imported(tmp_path, TRL + "loss_type: sigmoid\n")).train.learning_rate == 1e-6
    assert recipe_of(imported(tmp_path, TRL + "loss_type: sigmoid\nlearning_rate: 3e-6\n")).train.learning_rate == 3e-6


TURNS = [{"role": "user", "content": "Is it warm?"}]
ANSWERS = {"chosen": {"role": "assistant", "content": "Yes."}, "rejected": {"role": "assistant", "content": "No."}}


@pytest.mark.parametrize(
    ("goal", "entry", "row", "lost"),
    [
        ("dpo", {"type": "chat_template.default", "field_messages": "conversation", "field_chosen": "chosen",
                 "roles": {"user": ["user"]}}, {"conversation": TURNS, **ANSWERS}, set()),
        ("dpo", {"type": "chatml.intel"}, {"system": "s", "question": "Warm?", "chosen": "Yes.", "rejected": "No."},
         {"datasets.type"}),
        ("ipo", {"type": "llama3.argilla"}, {"instruction": "Warm?", "chosen_response": "Yes.",
                                             "rejected_response": "No."}, {"datasets.type"}),
        ("orpo", {"type": "chat_template.argilla"},
         {side: [*TURNS, answer] for side, answer in ANSWERS.items()}, set()),
        ("simpo", {"type": "chat_template.default", "field_chosen": "good", "field_rejected": "bad"},
         {"prompt": "Warm?", "good": "Yes.", "bad": "No."}, set()),
        ("dpo", {"type": {"field_prompt": "asked", "field_chosen": "a", "field_rejected": "b", "prompt_format": "{p}"}},
         {"asked": "Warm?", "a": "Yes.", "b": "No."}, {"datasets.type"}),
        ("dpo", {"type": "zephyr.nectar"}, None, {"datasets.type"}),
        ("kto", {"type": "llama3.ultra"}, {"prompt": "Warm?", "completion": "Yes.", "label": True}, {"datasets.type"}),
        ("kto", {"type": {"field_prompt": "q", "field_completion": "a", "field_label": "ok"}},
         {"q": "Warm?", "a": "Yes.", "ok": False}, set()),
    ],
)  # fmt: skip
def test_axolotls_rows_are_read(goal: str, entry: dict[str, Any], row: dict[str, Any] | None, lost: set[str]) -> None:
    from qlora.importers import datasets

    made = draft()
    made.values[preferences.KEY] = goal
    datasets.axolotl(made, "datasets", [{"path": "a/b", **entry}])
    (source,) = made.sources
    assert "format" not in source and set(left(made)) == lost
    if row is not None:
        judged = to_judged(renamed(row, source.get("columns", {})), "kto" if goal == "kto" else "preference")
        assert judged.messages[-1]["content"] == "Yes." and len(judged.sides) == (1 if goal == "kto" else 2)
        assert judged.sign == (-1 if row.get("ok") is False else 1)


FACTORY_ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pairs": (
        "dpo",
        {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "conversations", "chosen": "chosen"}},
        {"conversations": [{"from": "human", "value": "Warm?"}], "chosen": {"from": "gpt", "value": "Yes."},
         "rejected": {"from": "gpt", "value": "No."}},
    ),
    "marked": (
        "kto",
        {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "fine"},
         "tags": {"role_tag": "role"}},
        {"messages": [*TURNS, ANSWERS["chosen"]], "fine": True},
    ),
    "plain": (
        "dpo",
        {"ranking": True, "columns": {"prompt": "asked", "chosen": "good", "rejected": "bad"}},
        {"asked": "Warm?", "good": "Yes.", "bad": "No."},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FACTORY_ROWS))
def test_llama_factorys_rows_are_read(tmp_path: Path, name: str) -> None:
    stage, entry, row = FACTORY_ROWS[name]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}))
    found = imported(tmp_path, f"{FACTORY}stage: {stage}\ndataset: mine\n")
    (source,) = recipe_of(found).data.train
    assert source.path == str(tmp_path / "data" / "rows.json") and set(left(found)) == {"template"}
    judged = to_judged(renamed(row, source.columns), "kto" if stage == "kto" else "preference")
    assert judged.messages[-1]["content"] == "Yes."


def test_a_starting_adapter_is_what_is_compared_with_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    lines = "stage: dpo\nadapter_name_or_path: before\n"
    assert "with it here" in left(imported(tmp_path, FACTORY + lines))["ref_model"]
    assert "ref_model" not in left(imported(tmp_path, FACTORY + lines + "pref_loss: orpo\n"))


def test_a_key_is_read_by_its_objectives_alone() -> None:
    made = draft()
    made.values[preferences.KEY] = "ipo"
    preferences.of(("dpo",), "train.label_smoothing")(made, "smoothing", 0.1)
    preferences.more_of_answers(made, "ftx", 0.5)
    assert made.values == {preferences.KEY: "ipo", "train.sft_weight": 0.5} and not left(made)
    preferences.begin(made, "rl", "kto", None)
    preferences.more_of_answers(made, "ftx", 0.5)
    assert made.values["train.beta"] == 0.1 and set(left(made)) == {"ftx"}
    assert preferences.named_loss("loss", ["ipo"]) == "ipo"
