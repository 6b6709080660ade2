"""axolotl's YAML (its `src/axolotl/utils/schemas/`): keys, and defaults that change what is learned."""

from __future__ import annotations

from typing import Any

from qlora.importers import datasets, preferences, tracking
from qlora.importers.draft import Draft, Rules, carried, left, off, ours
from qlora.importers.values import (
    ITS_TOKENS,
    ONE_GPU,
    SHARED,
    SPEED,
    attention,
    batches,
    init,
    is_on,
    modules,
    names,
    number,
    optimizer,
    positive,
    scheduler,
    share,
    switch,
    text,
)

NAME = "axolotl"
MARKS = ("base_model", "sequence_len", "micro_batch_size", "adapter", "num_epochs", "val_set_size", "datasets")
# Of its schema and builders (core/builders/base.py has the warm-up): what it does where a key is not set.
DEFAULTS: dict[str, Any] = {
    "sequence_len": 512,
    "num_epochs": 1.0,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch_fused",
    "sample_packing": False,
    "val_set_size": 0.0,
    "lora_dropout": 0.0,
}


def _quantized(draft: Draft, key: str, value: Any) -> None:
    on = value in (True, "true")
    if key == "load_in_8bit":
        if on:
            draft.leave(key, value, "a base in 8 bit is not built: quantization.type = nf4 takes half of that")
            draft.values["quantization.type"] = "nf4"
        else:
            draft.ours(key, "off, as here")
    elif on:
        draft.carry(key, "quantization.type", "nf4")
    elif "quantization.type" not in draft.values:
        draft.carry(key, "quantization.type", "none", 'a base in 16 bit; "nf4" takes a quarter of the memory')
    else:
        draft.ours(key, "off, and load_in_8bit is on")


def _adapter(draft: Draft, key: str, value: Any) -> None:
    if value in ("qlora", "lora"):
        draft.ours(key, "LoRA, over a base held as load_in_4bit says")
    else:
        draft.leave(key, value, "adapters are trained here: the base itself never")


def _template(draft: Draft, key: str, value: Any) -> None:
    if value in ("tokenizer_default", "chatml"):
        draft.carry(key, "model.chat_template", "chatml" if value == "chatml" else "auto")
    else:
        draft.leave(key, value, "the base's own template is taken; model.chat_template names a file of another")


def _loss(draft: Draft, key: str, value: Any) -> None:
    carried("data.loss_on", lambda said: "all" if switch(said) else "assistant")(draft, key, value)


def _overlong(draft: Draft, key: str, value: Any) -> None:
    kinds = {"drop": "drop", "truncate": "cut", "raise": "error"}
    if isinstance(value, str) and value in kinds:
        draft.carry(key, "data.truncation", kinds[value])
    else:
        draft.leave(key, value, "data.truncation is drop, cut or error")


def _bnb(draft: Draft, key: str, value: Any) -> None:
    known = {
        "bnb_4bit_use_double_quant": carried("quantization.double_quant", switch),
        "bnb_4bit_quant_type": carried("quantization.type", text)
        if draft.values.get("quantization.type") != "none"
        else ours("read for 4 bit alone"),
        "bnb_4bit_compute_dtype": ours("computed in bf16"),
    }
    for name, item in value.items() if isinstance(value, dict) else ():
        known.get(name, left("no counterpart"))(draft, f"{key}.{name}", item)
    if not isinstance(value, dict):
        draft.leave(key, value, "it is no table")


def _other_goal(draft: Draft, key: str, value: Any) -> None:
    """Rewards and their like: rows of another kind, and another loss. Raises UserError."""
    if value in (False, "false"):
        draft.ours(key, "off, as here")
        return
    preferences.refuse(key, value)


def _preference(draft: Draft, table: dict[str, Any]) -> None:
    """`rl` and what decides its strength (src/axolotl/core/builders/rl.py). Raises UserError for another goal."""
    wanted = table.pop("rl", None)
    if wanted in (None, False, "false"):
        if wanted is not None:
            draft.ours("rl", "off, as here")
        return
    objective = wanted
    if wanted == "dpo" and (loss := table.pop("dpo_loss_type", None)) is not None:
        objective = preferences.named_loss("dpo_loss_type", loss)
        draft.ours("dpo_loss_type", f"with rl: {preferences.KEY} = {objective}")
    if objective not in preferences.OBJECTIVES:
        preferences.refuse("rl", wanted)
    beside = table.pop("trl", None)
    beside = {f"trl.{key}": value for key, value in beside.items()} if isinstance(beside, dict) else {}
    known = (
        "trl.beta",
        "rl_beta",
        "orpo_alpha",
        "dpo_beta",
    )  # the first that is set decides; the last is an older name
    given = [(key, value) for key in known if (value := beside.pop(key, table.pop(key, None))) is not None]
    preferences.begin(draft, "rl", objective, given[0] if given else None)
    for key, value in given[1:]:
        draft.ours(key, f"{given[0][0]} decides: {value}")
    for key, value in beside.items():
        draft.leave(key, value, "read for rewards alone")
    if objective == "simpo":
        carried("train.simpo_gamma", number)(draft, "simpo_gamma", table.pop("simpo_gamma", preferences.GAMMA))
        weight = table.pop("cpo_alpha", preferences.CPO_ALPHA)
        carried("train.sft_weight", number, preferences.OF_TOKENS)(draft, "cpo_alpha", weight)
    if objective == "orpo":
        draft.leave("rl", "orpo", preferences.OF_QUESTIONS)


KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "flash_attn_cross_entropy", "flash_attn_rms_norm")
LIGER = (
    "liger_rms_norm",
    "liger_glu_activation",
    "liger_layer_norm",
    "liger_rope",
    "liger_swiglu",
    "liger_rms_norm_gated",
)
RULES: Rules = {
    **SHARED,
    "base_model": carried("model.base", text),
    "revision_of_model": carried("model.revision", text),
    "attn_implementation": attention,
    **dict.fromkeys(("flash_attention", "xformers_attention", "sdp_attention", "flex_attention"), attention),
    "load_in_4bit": _quantized,
    "load_in_8bit": _quantized,
    "bnb_config_kwargs": _bnb,
    "adapter": _adapter,
    "lora_r": carried("lora.r", positive),
    "lora_alpha": carried("lora.alpha", number),
    "lora_dropout": carried("lora.dropout", number),
    "lora_target_modules": carried("lora.target_modules", modules),
    "lora_target_linear": lambda draft, key, value: (
        draft.carry(key, "lora.target_modules", "all-linear") if value in (True, "true") else draft.ours(key, "off")
    ),
    "lora_modules_to_save": carried("lora.modules_to_save", names),
    "peft_use_dora": carried("lora.use_dora", switch),
    "peft_use_rslora": carried("lora.use_rslora", switch),
    "peft_init_lora_weights": carried("lora.init", init),
    "datasets": datasets.axolotl,
    "test_datasets": datasets.axolotl,
    "pretraining_dataset": datasets.axolotl,
    "chat_template": _template,
    "chat_template_jinja": left("write it to a file, and name that in model.chat_template"),
    "sequence_len": carried("data.max_length", positive),
    "sample_packing": carried("data.packing", switch),
    "train_on_inputs": preferences.not_of(preferences.ANSWERS_ALONE, _loss),
    "val_set_size": carried("data.eval_fraction", share),
    "excess_length_strategy": _overlong,
    "num_epochs": carried("train.epochs", number),
    "lr_scheduler": scheduler,
    "optimizer": carried("train.optimizer", optimizer),
    "early_stopping_patience": carried("eval.early_stopping_patience", positive),
    **dict.fromkeys(("reward_model", "process_reward_model", "num_labels"), _other_goal),
    **dict.fromkeys(("trl", "ebft", "gdpo", "diffusion"), _other_goal),
    **dict.fromkeys(("rl_beta", "orpo_alpha", "dpo_beta", "dpo_loss_type"), ours("read beside rl alone")),
    **dict.fromkeys(("simpo_gamma", "cpo_alpha"), ours("read for simpo alone")),
    "dpo_label_smoothing": preferences.of(("dpo",), "train.label_smoothing"),
    "rpo_alpha": preferences.of(("dpo", "ipo"), "train.sft_weight", note=preferences.OF_TOKENS),
    **{f"kto_{name}": rule for name, rule in preferences.WEIGHTS.items()},
    **dict.fromkeys(("dpo_use_weighting", "dpo_norm_loss", "dpo_loss_weights"), off("not built")),
    **dict.fromkeys(("dpo_padding_free", "dpo_use_logits_to_keep", "dpo_generate_during_eval"), ours(SPEED)),
    "precompute_ref_log_probs": ours("each answer is asked once, and kept"),
    "max_prompt_len": left("a question is not cut apart from its answer"),
    **dict.fromkeys(("special_tokens", "tokens", "eot_tokens", "resize_token_embeddings_to_32x"), left(ITS_TOKENS)),
    **dict.fromkeys(("model_type", "tokenizer_type", "processor_type", "tokenizer_config"), ours(ITS_TOKENS)),
    **dict.fromkeys(("tokenizer_use_fast", "tokenizer_legacy", "is_llama_derived_model"), ours(ITS_TOKENS)),
    "tokenizer_use_mistral_common": off(ITS_TOKENS),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), left("eval.every_steps and checkpoint.every_steps decide")),
    **dict.fromkeys(("pad_to_sequence_len", "eval_sample_packing", "dataset_prepared_path"), ours(SPEED)),
    **dict.fromkeys(
        ("dataset_processes", "dataset_num_proc", "sample_packing_eff_est", "low_cpu_mem_usage"), ours(SPEED)
    ),
    **dict.fromkeys(
        ("activation_offloading", "use_kernels", "experts_implementation", "flex_attn_compile_kwargs"), ours(SPEED)
    ),
    **dict.fromkeys(
        (*KERNELS, *LIGER, "liger_fused_linear_cross_entropy", "cut_cross_entropy", "plugins"), ours(SPEED)
    ),
    **dict.fromkeys(("strict", "debug", "skip_prepare_dataset", "shuffle_merged_datasets"), ours("as here")),
    **dict.fromkeys(
        ("loss_watchdog_threshold", "loss_watchdog_patience"), ours("spikes are said; what is not finite stops")
    ),
    "lora_model_dir": datasets.adapter,
    "lora_target_parameters": left("lora.experts = true adapts all of a mixture's experts"),
    **dict.fromkeys(("quantize_moe_experts", "unfrozen_parameters", "qat", "quantization"), left("not built")),
    "gptq": off("the base's 16-bit weights are needed"),
    "lora_fan_in_fan_out": off("layers of GPT-2's shape are not trained"),
    "neftune_noise_alpha": carried("train.neftune_alpha", number),
    "noisy_embedding_alpha": carried("train.neftune_alpha", number),
    **dict.fromkeys(
        ("dp_shard_size", "dp_replicate_size", "tensor_parallel_size", "context_parallel_size"), off(ONE_GPU)
    ),
    **dict.fromkeys(("sequence_parallel_degree", "expert_parallel_size"), off(ONE_GPU)),
    **{f"use_{name}": tracking.switch_of(name) for name in ("wandb", "tensorboard", "mlflow", "trackio")},
    **{f"use_{name}": tracking.switch_of(name) for name in ("comet", "swanlab")},
    **{f"{name}_project{end}": tracking.named_by(name) for name, end in (("wandb", ""), ("trackio", "_name"))},
    "mlflow_experiment_name": tracking.named_by("mlflow"),
    "mlflow_tracking_uri": left("the environment's MLFLOW_TRACKING_URI is read"),
    **{f"wandb_{name}": off(tracking.NAMES) for name in ("entity", "watch", "name", "log_model", "run_id")},
    **dict.fromkeys(("trackio_run_name", "trackio_space_id"), off(tracking.NAMES)),
    **dict.fromkeys(("save_only_model", "save_first_step"), off("a checkpoint is whole here")),
}


def _besides_linear(draft: Draft, value: Any) -> None:
    """Modules beside `lora_target_linear`: both are meant, and only what is no linear layer of a block adds to it."""
    try:
        more = sorted({"lm_head", "embed_tokens"} & set(names(value)))
    except ValueError as error:
        draft.leave("lora_target_modules", value, f"lora.target_modules: {error}")
        return
    if more:
        draft.leave("lora_target_modules", ", ".join(more), "no part of all-linear, which lora_target_linear asks for")
    else:
        draft.ours("lora_target_modules", "lora_target_linear has every linear layer")


def settle(draft: Draft, table: dict[str, Any]) -> None:
    """What several keys say together."""
    _preference(draft, table)
    micro, passes = table.pop("micro_batch_size", 1), table.pop("gradient_accumulation_steps", 1)
    if (whole := table.pop("batch_size", None)) is not None:
        draft.leave("batch_size", whole, "micro_batch_size × gradient_accumulation_steps is taken")
    batches(draft, ("micro_batch_size", micro), ("gradient_accumulation_steps", passes))
    if table.get("load_in_4bit") is None and table.get("load_in_8bit") in (None, False):
        # Its `qlora` means 4 bit; `lora` alone means a base in 16.
        draft.values["quantization.type"] = "nf4" if table.get("adapter") == "qlora" else "none"
    for key in ("load_in_8bit", "load_in_4bit"):  # before bnb_config_kwargs, whose type is read for 4 bit alone
        if key in table:
            _quantized(draft, key, table.pop(key))
    if "adapter" not in table:
        draft.leave("adapter", "not set", "the base itself is trained there: here LoRA is, over it")
    if is_on(table.get("lora_target_linear")) and "lora_target_modules" in table:
        _besides_linear(draft, table.pop("lora_target_modules"))
    if table.get("pretraining_dataset") is not None:
        draft.carry("pretraining_dataset", "data.loss_on", "all", "every token of raw text")
