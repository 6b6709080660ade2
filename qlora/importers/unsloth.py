"""Unsloth Studio's YAML: tables `data`, `training`, `lora` and `logging`, and the `model` beside them."""

from __future__ import annotations

from typing import Any

from qlora.importers import datasets, tracking
from qlora.importers.draft import Draft, Rules, carried, left, off, ours
from qlora.importers.values import SHARED, batches, modules, number, positive, switch, text

NAME = "Unsloth Studio"
MARKS = ("model", "data", "training", "lora", "logging", "training.max_seq_length", "training.training_type")
DEFAULTS: dict[str, Any] = {}  # its files set every key that changes what is learned
FORMATS = {"auto": "auto", "alpaca": "alpaca", "chatml": "messages", "sharegpt": "sharegpt"}


def _kind(draft: Draft, key: str, value: Any) -> None:
    if value in ("lora", "qlora", "LoRA", "QLoRA", "LoRA/QLoRA"):
        draft.ours(key, "LoRA, as here")
    else:
        draft.leave(key, value, "adapters are trained here: the base itself never")


def _four_bit(draft: Draft, key: str, value: Any) -> None:
    carried("quantization.type", lambda said: "nf4" if switch(said) else "none")(draft, key, value)


def _format(draft: Draft, key: str, value: Any) -> None:
    if not isinstance(value, str) or value not in FORMATS:
        draft.leave(key, value, "told by the columns")
        return
    for entry in draft.sources:
        entry["format"] = FORMATS[value]
    draft.note(key, f'format = "{FORMATS[value]}"')


_SHARED = (
    *("learning_rate", "weight_decay", "warmup_steps", "warmup_ratio", "max_steps", "save_steps", "eval_steps"),
    *("gradient_checkpointing", "optim", "lr_scheduler_type", "output_dir", "trust_remote_code"),
)
RULES: Rules = {
    "model": carried("model.base", text),
    "data.dataset": datasets.named,
    "data.local_dataset": datasets.named,
    "data.format_type": _format,
    "data.custom_format_mapping": left("columns of a source name them: columns = { instruction = ... }"),
    "training.training_type": _kind,
    "training.max_seq_length": carried("data.max_length", positive),
    "training.load_in_4bit": _four_bit,
    "training.num_epochs": carried("train.epochs", number),
    "training.random_seed": carried("train.seed", positive),
    "training.packing": carried("data.packing", switch),
    "training.train_on_completions": carried("data.loss_on", lambda said: "assistant" if switch(said) else "all"),
    **{f"training.{name}": SHARED[name] for name in _SHARED},
    "lora.lora_r": carried("lora.r", positive),
    "lora.lora_alpha": carried("lora.alpha", number),
    "lora.lora_dropout": carried("lora.dropout", number),
    "lora.target_modules": carried("lora.target_modules", modules),
    "lora.use_rslora": carried("lora.use_rslora", switch),
    "lora.use_loftq": off("a start that changes the base is refused"),
    "lora.init_lora_weights": off("not built"),
    "lora.vision_all_linear": off("text alone is trained"),
    "lora.finetune_vision_layers": ours("text alone is trained"),
    **dict.fromkeys(
        (f"lora.finetune_{part}" for part in ("language_layers", "attention_modules", "mlp_modules")),
        ours("by lora.target_modules"),
    ),
    **{f"logging.enable_{name}": tracking.switch_of(name) for name in ("wandb", "tensorboard")},
    **dict.fromkeys(("logging.wandb_project", "logging.tensorboard_dir"), ours(tracking.NAMES)),
    "logging.log_frequency": ours("each step is an event"),
    **dict.fromkeys(("logging.wandb_token", "logging.hf_token"), left("a secret has no place in a recipe")),
}


def settle(draft: Draft, table: dict[str, Any]) -> None:
    """What several keys say together."""
    micro, passes = table.pop("training.batch_size", 2), table.pop("training.gradient_accumulation_steps", 4)
    batches(draft, ("training.batch_size", micro), ("training.gradient_accumulation_steps", passes))
    draft.carry("rows held out", "data.eval_fraction", 0.0, "not set: none")
    if table.get("training.num_epochs") in (0, 0.0):  # max_steps decides then
        draft.ours("training.num_epochs", f"{table.pop('training.num_epochs')}: steps decide")
