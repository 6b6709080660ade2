"""TRL's configurations of SFT, DPO, KTO, ORPO and CPO (SimPO) and script arguments, as JSON or YAML."""

from __future__ import annotations

from typing import Any

from qlora.errors import UserError
from qlora.importers import datasets, preferences
from qlora.importers.draft import Draft, Rules, as_shown, carried, left, off, ours
from qlora.importers.values import (
    ITS_TOKENS,
    SHARED,
    SPEED,
    attention,
    batches,
    is_on,
    modules,
    names,
    number,
    positive,
    switch,
    text,
)

NAME = "TRL"
MARKS = (
    *("dataset_name", "max_length", "max_seq_length", "assistant_only_loss", "completion_only_loss", "use_peft"),
    *("packing_strategy", "per_device_train_batch_size", "dataset_text_field", "eos_token", "dataset_kwargs"),
)
# What a key says that is there and null.
NULLS = {"max_length": "no row is cut there; data.max_length is our default here, and longer rows are cut to it"}
# Of trl/trainer/sft_config.py and trl/trainer/model_config.py (0.2x); rows over max_length are cut.
DEFAULTS: dict[str, Any] = {
    "max_length": 1024,
    "learning_rate": 2e-5,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "optim": "adamw_torch_fused",
    "packing": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
}

# trl/trainer/sft_trainer.py: `completion_only_loss` of None is whether the first row has `prompt` and `completion`.
# A file does not name its trainer; these keys, or a `loss_type`, do. TRL 1.16: trl/trainer/{dpo,kto}_config.py and
# trl/experimental/{orpo,cpo}/*_config.py.
_OF_DPO = (
    *("precompute_ref_log_probs", "precompute_ref_batch_size", "label_smoothing", "f_divergence_type", "rpo_alpha"),
    *("sync_ref_model", "ref_model_mixup_alpha", "use_weighting", "discopop_tau", "ld_alpha", "loss_weights"),
)
_OF_KTO = ("desirable_weight", "undesirable_weight")
_OF_OTHERS = (
    *("num_generations", "reward_funcs", "reward_weights", "num_ppo_epochs", "center_rewards_coefficient", "lmbda"),
    *("reward_model_path", "value_model_path", "response_length", "temperature_teacher"),
)
_PLAIN = ("nll", "chunked_nll")
_SUPERVISED = (*_PLAIN, "dft")
_OF_ORPO = ("is_encoder_decoder", "generate_during_eval")  # where no loss_type is: CPO has one
_UNTOLD = "beta: several trainers of TRL have it, and no other key says which one this is for"
_TELL = "add loss_type: sigmoid for DPO (ipo for IPO, kto for KTO, simpo for SimPO), is_encoder_decoder: false for ORPO"
_LEARNING_RATE = 1e-6  # of all four, where SFTConfig has 2e-5

_COMPLETIONS = (
    'of rows with prompt and completion, the completion alone is trained there: data.loss_on = "assistant" is that'
)


def _bits(draft: Draft, key: str, value: Any) -> None:
    if is_on(value) and key == "load_in_8bit":
        draft.leave(key, value, "a base in 8 bit is not built: quantization.type = nf4 takes half of that")
        draft.values.setdefault("quantization.type", "nf4")
    elif is_on(value):
        draft.carry(key, "quantization.type", "nf4")
    else:
        draft.ours(key, "off")


def _peft(draft: Draft, key: str, value: Any) -> None:
    if value in (True, "true"):
        draft.ours(key, "LoRA, as here")
    else:
        draft.leave(key, value, "adapters are trained here: the base itself never")


def _split(draft: Draft, key: str, value: Any) -> None:
    """Of the data set that `dataset_name` has named; which comes first (`settle`)."""
    found = [entry for entry in draft.sources if entry["path"].startswith("hub:")]
    if value == "train" or not found:
        draft.ours(key, "the training split is read")
        return
    for entry in found:
        entry["path"] += f":{value}"
    draft.note(key, f"path = {found[-1]['path']}")


def _field(draft: Draft, key: str, value: Any) -> None:
    if value == "text" or not draft.sources or not isinstance(value, str):
        draft.ours(key, "a column `text` is trained whole")
        return
    for entry in draft.sources:
        entry["columns"] = {"text": value}
    draft.note(key, f"columns = {{ text = {value!r} }}")


def _goal(table: dict[str, Any]) -> tuple[str, str] | None:
    """The objective and the key that tells it; None of supervised learning. Raises UserError for another goal."""
    loss = table.get("loss_type")
    if other := next((key for key in _OF_OTHERS if key in table), None):
        preferences.refuse(other, table[other])
    if loss == "kto" or any(key in table for key in _OF_KTO):
        if loss not in (None, "kto"):
            preferences.refuse("loss_type", loss)
        return "kto", "loss_type" if loss else next(key for key in _OF_KTO if key in table)
    if loss is not None and loss not in _SUPERVISED:
        if loss in ("sigmoid", "hinge") and "cpo_alpha" in table:
            preferences.refuse("cpo_alpha", table["cpo_alpha"], "CPO is built with loss_type: simpo alone")
        return preferences.named_loss("loss_type", loss), "loss_type"
    if of_dpo := next((key for key in _OF_DPO if key in table), None):
        return "dpo", of_dpo
    if "beta" not in table:
        return None
    if of_orpo := next((key for key in _OF_ORPO if key in table), None):
        return "orpo", of_orpo
    raise UserError(_UNTOLD, _TELL)


def _preference(draft: Draft, table: dict[str, Any]) -> None:
    """The goal, what decides its strength, and defaults that are others than SFT's."""
    if (told := _goal(table)) is None:
        return
    objective, key = told
    beta = table.pop("beta", None)
    preferences.begin(draft, key, objective, None if beta is None else ("beta", beta))
    table.pop("loss_type", None)
    if objective == "simpo":
        carried("train.simpo_gamma", number)(draft, "simpo_gamma", table.pop("simpo_gamma", preferences.GAMMA))
        weight = table.pop("cpo_alpha", preferences.CPO_ALPHA)
        carried("train.sft_weight", number, preferences.OF_TOKENS)(draft, "cpo_alpha", weight)
    if objective == "orpo":
        draft.leave("beta", beta, preferences.OF_QUESTIONS)
    if "learning_rate" not in table:
        draft.carry("learning_rate", "train.learning_rate", _LEARNING_RATE, "not set: its default")


def _loss(draft: Draft, key: str, value: Any) -> None:
    if value not in (True, "true"):
        draft.ours(key, "off: every token is trained")
    elif key == "assistant_only_loss":
        draft.carry(key, "data.loss_on", "assistant")
    else:
        draft.carry(
            key, "data.loss_on", "assistant", "of rows with prompt and completion; chats are trained whole there"
        )


def _supervised_loss(draft: Draft, key: str, value: Any) -> None:
    """SFT's; those of preference have decided the goal (`settle`)."""
    if value in _PLAIN:
        draft.ours(key, "the loss of each trained token, as here")
    else:
        draft.leave(key, value, "not built")


def _divergence(draft: Draft, key: str, value: Any) -> None:
    if value == "reverse_kl":
        draft.ours(key, "the divergence of its paper, as here")
    else:
        preferences.refuse(key, value)


def _truncation(draft: Draft, key: str, value: Any) -> None:
    if value == "keep_start":
        draft.ours(key, "rows are cut to their first tokens, as here")
    else:
        draft.leave(key, value, "rows are cut to their first tokens here")


RULES: Rules = {
    **SHARED,
    "dataset_name": datasets.named,
    "train_file": datasets.named,
    "dataset_train_split": _split,
    "dataset_text_field": _field,
    "dataset_test_split": left("name it in [[data.eval]]"),
    "dataset_config": left("a data set's configuration is not chosen: name its files in [[data.train]]"),
    "dataset_num_proc": ours(SPEED),
    "dataset_kwargs": left("rows are always prepared here"),
    **dict.fromkeys(("model_name_or_path", "model_name"), carried("model.base", text)),
    "model_revision": carried("model.revision", text),
    "attn_implementation": attention,
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), _bits),
    "bnb_4bit_quant_type": carried("quantization.type", text),
    **dict.fromkeys(
        ("use_bnb_nested_quant", "bnb_4bit_use_double_quant"), carried("quantization.double_quant", switch)
    ),
    **dict.fromkeys(("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"), ours("computed in bf16")),
    "use_peft": _peft,
    "lora_r": carried("lora.r", positive),
    "lora_alpha": carried("lora.alpha", number),
    "lora_dropout": carried("lora.dropout", number),
    "lora_target_modules": carried("lora.target_modules", modules),
    "lora_modules_to_save": carried("lora.modules_to_save", names),
    **dict.fromkeys(
        ("use_rslora", "use_dora"), lambda draft, key, value: carried(f"lora.{key}", switch)(draft, key, value)
    ),
    "lora_task_type": ours("a causal model"),
    **dict.fromkeys(("max_length", "max_seq_length"), carried("data.max_length", positive)),
    "packing": carried("data.packing", switch),
    **dict.fromkeys(("packing_strategy", "padding_free", "eval_packing", "pad_to_multiple_of"), ours(SPEED)),
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss"), preferences.not_of(preferences.ANSWERS_ALONE, _loss)
    ),
    **preferences.WEIGHTS,
    "label_smoothing": preferences.of(("dpo",), "train.label_smoothing"),
    "rpo_alpha": preferences.of(("dpo", "ipo"), "train.sft_weight", note=preferences.OF_TOKENS),
    **dict.fromkeys(("simpo_gamma", "cpo_alpha"), ours("read for simpo alone")),
    **dict.fromkeys(("use_weighting", "sync_ref_model", "ld_alpha"), off("not built")),
    "f_divergence_type": _divergence,
    **dict.fromkeys(("ref_model", "ref_model_init_kwargs", "ref_adapter_name"), left(preferences.REFERENCE)),
    "precompute_ref_log_probs": ours("each answer is asked once, and kept"),
    **dict.fromkeys(
        (
            *("precompute_ref_batch_size", "discopop_tau", "f_alpha_divergence_coef", "ref_model_mixup_alpha"),
            *("ref_model_sync_steps", "disable_dropout", "generate_during_eval", "is_encoder_decoder"),
            *("label_pad_token_id", "padding_value", "loss_weights", "model_adapter_name", "train_sampling_strategy"),
            *("use_logits_to_keep", "alpha", "use_liger_loss"),
        ),
        ours("says nothing beside what is carried"),
    ),
    **dict.fromkeys(("max_prompt_length", "max_completion_length"), left("rows are cut at data.max_length alone")),
    "truncation_mode": _truncation,
    "chat_template_path": carried("model.chat_template", text),
    **dict.fromkeys(("eos_token", "pad_token"), left(ITS_TOKENS)),
    **dict.fromkeys(("activation_offloading", "disable_tqdm", "log_level", "use_cpu", "use_cache"), ours(SPEED)),
    **dict.fromkeys(("model_init_kwargs", "shuffle_dataset"), off("not built")),
    "loss_type": _supervised_loss,
    "data_seed": ours("train.seed decides the order"),
}


def settle(draft: Draft, table: dict[str, Any]) -> None:
    """What several keys say together, or one says beside its own."""
    _preference(draft, table)
    for key in ("dataset_name", "train_file"):  # before what is said of them
        if table.get(key) is not None:
            RULES[key](draft, key, table.pop(key))
    micro, passes = table.pop("per_device_train_batch_size", 8), table.pop("gradient_accumulation_steps", 1)
    batches(draft, ("per_device_train_batch_size", micro), ("gradient_accumulation_steps", passes))
    if is_on(table.get("load_in_4bit")):  # before its type
        _bits(draft, "load_in_4bit", table.pop("load_in_4bit"))
    else:
        if "bnb_4bit_quant_type" in table:  # every dump of ModelConfig has it
            said = as_shown("", table.pop("bnb_4bit_quant_type"))
            draft.ours("bnb_4bit_quant_type", f"{said}: read for 4 bit alone")
        if not is_on(table.get("load_in_8bit")):
            draft.carry("load_in_4bit", "quantization.type", "none", 'off: 16 bit; "nf4" takes a quarter of that')
    asked = ("assistant_only_loss", "completion_only_loss")
    if preferences.goal(draft) == "sft" and not any(table.get(key) in (True, "true") for key in asked):
        draft.carry("assistant_only_loss", "data.loss_on", "all", "not set: of chats, every token")
        if table.get("completion_only_loss") is None:  # what its rows are decides then
            draft.leave("completion_only_loss", "not set", _COMPLETIONS)
    draft.carry("max_length", "data.truncation", "cut", "rows over it are cut")
    draft.carry("rows held out", "data.eval_fraction", 0.0, "not set: none")
    if "use_peft" not in table:
        draft.leave("use_peft", "not set", "the base itself is trained there: here LoRA is, over it")
    elif is_on(table["use_peft"]) and "lora_target_modules" not in table:
        why = "PEFT picks them by architecture there, mostly q_proj and v_proj: every linear layer here"
        draft.leave("lora_target_modules", "not set", why)
