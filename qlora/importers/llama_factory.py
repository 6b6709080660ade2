"""LLaMA-Factory's YAML (its `src/llamafactory/hparams/`): keys, and defaults that change what is learned."""

from __future__ import annotations

from typing import Any

from qlora.importers import datasets, preferences
from qlora.importers.draft import Draft, Rules, as_shown, carried, left, off, ours
from qlora.importers.values import (
    ITS_TOKENS,
    ONE_GPU,
    SHARED,
    SPEED,
    attention,
    batches,
    is_on,
    modules,
    names,
    number,
    positive,
    share,
    switch,
    text,
)

NAME = "LLaMA-Factory"
MARKS = (
    "stage",
    "finetuning_type",
    "template",
    "cutoff_len",
    "lora_rank",
    "lora_target",
    "dataset",
    "model_name_or_path",
)
# Of its hparams and of transformers' TrainingArguments. Rows over cutoff_len are cut; alpha is twice the rank.
DEFAULTS: dict[str, Any] = {
    "cutoff_len": 2048,
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "optim": "adamw_torch",
    "packing": False,
    "val_size": 0.0,
    "train_on_prompt": False,
}
_IMAGES = "text alone is trained"


def _bits(draft: Draft, key: str, value: Any) -> None:
    if value in (4, "4"):
        draft.carry(key, "quantization.type", "nf4")
    else:
        draft.leave(key, value, "a base in so many bits is not built: quantization.type = nf4 is taken")
        draft.values["quantization.type"] = "nf4"


def _method(draft: Draft, key: str, value: Any) -> None:
    if value in ("bnb", "bitsandbytes"):
        draft.ours(key, "bitsandbytes, as here")
    else:
        draft.leave(key, value, "bitsandbytes alone quantizes here")


def _tuning(draft: Draft, key: str, value: Any) -> None:
    if value == "lora":
        draft.ours(key, "LoRA, over a base held as quantization_bit says")
    else:
        draft.leave(key, value, "adapters are trained here: the base itself never")


def _stage(draft: Draft, table: dict[str, Any]) -> None:
    """The goal, and what decides its strength. Raises UserError for rewards and their like."""
    if (stage := table.get("stage")) in (None, "sft"):
        return
    if stage == "pt":
        draft.carry("stage", "data.loss_on", "all", "every token of raw text")
    elif stage in ("dpo", "kto"):
        del table["stage"]
        loss = table.pop("pref_loss", None)
        objective = "kto" if stage == "kto" else preferences.named_loss("pref_loss", loss or "sigmoid")
        if loss is not None:
            draft.ours("pref_loss", "read for dpo alone" if stage == "kto" else f"{preferences.KEY} = {objective}")
        beta = table.pop("pref_beta", None)
        preferences.begin(draft, "stage", objective, None if beta is None else ("pref_beta", beta))
        if objective == "simpo":
            carried("train.simpo_gamma", number)(draft, "simpo_gamma", table.pop("simpo_gamma", preferences.GAMMA))
        if (weight := table.pop("pref_ftx", None)) is not None and (weight != 0 or objective != "kto"):
            preferences.more_of_answers(draft, "pref_ftx", weight)
    else:
        preferences.refuse("stage", stage, "stages sft, pt, dpo and kto are what can be imported")


def _imitated(draft: Draft, key: str, value: Any) -> None:
    """What is left of `stage` once goals are settled."""
    if value == "sft":
        draft.ours(key, "supervised fine-tuning, as here")


def _starting(draft: Draft, key: str, value: Any) -> None:
    datasets.adapter(draft, key, value)
    if "lora.from" in draft.values and preferences.goal(draft) in ("dpo", "ipo", "kto"):
        draft.leave("ref_model", "not set", "compared with the base without that adapter there, with it here")


def _template(draft: Draft, key: str, value: Any) -> None:
    if value in ("chatml", "default", "empty"):
        draft.leave(key, value, 'the base\'s own template is taken; model.chat_template = "chatml" is another')
    else:
        draft.leave(key, value, "the base's own template is taken, which theirs of that name imitates")


def _thinking(draft: Draft, key: str, value: Any) -> None:
    carried("model.template_kwargs", lambda said: {"enable_thinking": switch(said)})(draft, key, value)


def _recomputed(draft: Draft, key: str, value: Any) -> None:
    carried("train.gradient_checkpointing", lambda said: not switch(said))(draft, key, value)


RULES: Rules = {
    **SHARED,
    "model_name_or_path": carried("model.base", text),
    "model_revision": carried("model.revision", text),
    "flash_attn": attention,
    "quantization_bit": _bits,
    "quantization_method": _method,
    "quantization_type": carried("quantization.type", text),
    "double_quantization": carried("quantization.double_quant", switch),
    "finetuning_type": _tuning,
    "stage": _imitated,
    **dict.fromkeys(("pref_loss", "pref_beta", "pref_ftx"), ours("read by stages dpo and kto alone")),
    "simpo_gamma": ours("read for simpo alone"),
    "dpo_label_smoothing": preferences.of(("dpo",), "train.label_smoothing"),
    "kto_chosen_weight": preferences.WEIGHTS["desirable_weight"],
    "kto_rejected_weight": preferences.WEIGHTS["undesirable_weight"],
    **dict.fromkeys(("ref_model", "ref_model_adapters", "ref_model_quantization_bit"), left(preferences.REFERENCE)),
    **dict.fromkeys(("pref_bco_weight", "ld_alpha"), off("not built")),
    "lora_rank": carried("lora.r", positive),
    "lora_alpha": carried("lora.alpha", number),
    "lora_dropout": carried("lora.dropout", number),
    "lora_target": carried("lora.target_modules", modules),
    "additional_target": carried("lora.modules_to_save", names),
    "use_rslora": carried("lora.use_rslora", switch),
    "use_dora": carried("lora.use_dora", switch),
    "dataset": datasets.by_name,
    "eval_dataset": datasets.by_name,
    "dataset_dir": ours("where its list of data sets lies"),
    "template": _template,
    "enable_thinking": _thinking,
    "cutoff_len": carried("data.max_length", positive),
    "packing": carried("data.packing", switch),
    "neat_packing": ours("packed rows never see each other"),
    "train_on_prompt": preferences.not_of(
        preferences.ANSWERS_ALONE, carried("data.loss_on", lambda said: "all" if switch(said) else "assistant")
    ),
    "val_size": carried("data.eval_fraction", share),
    "disable_gradient_checkpointing": _recomputed,
    "max_samples": left("all rows are read; a source's weight below 1 draws a part of them"),
    "mask_history": off("a turn alone is not trained: mark messages with train = false"),
    "default_system": left("write it into the rows, or into a template of your own"),
    "adapter_name_or_path": _starting,
    "mix_strategy": left("rows are mixed by each source's weight"),
    "loraplus_lr_ratio": left("one learning rate for all"),
    "save_only_model": off("a checkpoint is whole here"),
    "plot_loss": ours("the losses stand in events.jsonl"),
    **dict.fromkeys(("overwrite_cache", "preprocessing_num_workers", "use_fast_tokenizer", "cache_dir"), ours(SPEED)),
    **dict.fromkeys(("use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_reentrant_gc"), ours(SPEED)),
    **dict.fromkeys(
        ("upcast_layernorm", "flash_attn_2", "low_cpu_mem_usage", "include_effective_tokens_per_second"), ours(SPEED)
    ),
    **dict.fromkeys(("resize_vocab", "add_tokens", "add_special_tokens", "split_special_tokens"), off(ITS_TOKENS)),
    **dict.fromkeys(("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels"), left(_IMAGES)),
    **dict.fromkeys(("video_maxlen", "video_fps", "media_dir"), left(_IMAGES)),
    **dict.fromkeys(("freeze_vision_tower", "freeze_multi_modal_projector"), ours(_IMAGES)),
    **dict.fromkeys(
        (f"use_{name}" for name in ("galore", "apollo", "badam", "adam_mini", "muon", "llama_pro")), off("not built")
    ),
    **dict.fromkeys(("pissa_init", "pissa_convert", "mixture_of_depths", "shift_attn", "streaming"), off("not built")),
    **dict.fromkeys(("use_dft_loss", "use_asft_loss", "use_eaft_loss", "use_kt", "fp8"), off("not built")),
    **dict.fromkeys(("predict_with_generate", "do_predict"), off("qlora-exam and [eval] ask questions")),
    "ray_num_workers": off(ONE_GPU),
}


def _alpha(draft: Draft, rank: Any) -> None:
    """Twice the rank, where alpha is not set; of a rank that is none, our own defaults are taken for both."""
    try:
        draft.carry("lora_alpha", "lora.alpha", 2.0 * positive(rank), "not set: twice the rank")
    except ValueError:
        draft.leave("lora_alpha", "not set", "it is twice a rank that cannot be read: our default is taken")


def _packing(draft: Draft, table: dict[str, Any]) -> None:
    """`neat_packing` packs by itself, whatever `packing` says; where neither is set, stage pt packs."""
    if is_on(table.get("neat_packing")):
        table.pop("neat_packing")
        draft.carry("neat_packing", "data.packing", True, "packed rows never see each other")
        if "packing" in table:
            draft.ours("packing", f"{as_shown('', table.pop('packing'))}: neat_packing packs by itself")
    elif "packing" not in table and table.get("stage") == "pt":
        draft.carry("packing", "data.packing", True, "not set: stage pt packs")


def settle(draft: Draft, table: dict[str, Any]) -> None:
    """What several keys say together, or one says beside its own."""
    _stage(draft, table)
    micro, passes = table.pop("per_device_train_batch_size", 8), table.pop("gradient_accumulation_steps", 1)
    batches(draft, ("per_device_train_batch_size", micro), ("gradient_accumulation_steps", passes))
    bits = table.pop("quantization_bit", None)
    if bits is None:
        draft.carry("quantization_bit", "quantization.type", "none", 'not set: 16 bit; "nf4" takes a quarter of that')
    else:  # before the type, which is read for 4 bit alone
        _bits(draft, "quantization_bit", bits)
    if bits not in (4, "4") and "quantization_type" in table:
        draft.ours("quantization_type", f"{as_shown('', table.pop('quantization_type'))}: read for 4 bit alone")
    if table.get("lora_alpha") is None:
        _alpha(draft, table.get("lora_rank", DEFAULTS["lora_rank"]))
    _packing(draft, table)
    draft.carry("cutoff_len", "data.truncation", "cut", "rows over it are cut")
