"""Values of other trainers as ours: numbers that YAML reads as text, names of optimizers, schedules and modules."""

from __future__ import annotations

import math
from typing import Any

from qlora.importers import tracking
from qlora.importers.draft import Draft, Rule, as_shown, carried, left, off, ours

OPTIMIZERS = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "paged_adamw_32bit"),
    **{name: name for name in ("paged_adamw_8bit", "adamw", "lion_8bit")},
}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant_with_warmup": "constant"}
# What follows from one GPU, a base in safetensors and tokens of its own; the same words for every trainer.
ONE_GPU = "torchrun starts a process a card here, each with the whole model"
ITS_TOKENS = "tokens, padding and classes are the base's own, read from its folder"
SPEED = "how it is computed, and not what is learned: decided here by the card"


def is_on(value: Any) -> bool:
    """Whether a switch is on, where what is neither on nor off is told by the key's own rule."""
    return value in (True, "true")


def number(value: Any) -> float:
    """A finite number; YAML 1.1 reads 2e-4 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("it is no number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise ValueError("it is no number") from None
    if not math.isfinite(found):
        raise ValueError("it is no finite number")
    return found


def whole(value: Any) -> int:
    found = number(value)
    if found != int(found) or abs(found) > 2**53:
        raise ValueError("it is no whole number")
    return int(found)


def positive(value: Any) -> int:
    if (found := whole(value)) < 1:
        raise ValueError("it is not positive")
    return found


def switch(value: Any) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    if isinstance(value, bool | int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ValueError("it is neither true nor false")


def share(value: Any) -> float:
    """A part of the whole; from 1 on other trainers mean a number of rows or steps."""
    found = number(value)
    if not 0 <= found < 1:
        raise ValueError("a number of rows or steps, which part they are is not known here")
    return found


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it is no name")
    return value.strip()


def names(value: Any) -> list[str]:
    """A list of names, or one text with commas."""
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) and name.strip() for name in found):
        raise ValueError("it is no list of names")
    return [name.strip() for name in found]


def modules(value: Any) -> str | list[str]:
    """Target modules; "all" and "all-linear" are every linear layer but the head."""
    found = names(value)
    return "all-linear" if found in (["all"], ["all-linear"], ["all_linear"]) else found


def init(value: Any) -> str:
    found = {True: "default", "true": "default", "gaussian": "gaussian", "eva": "eva"}
    if isinstance(value, bool | str) and (value.lower() if isinstance(value, str) else value) in found:
        return found[value.lower() if isinstance(value, str) else value]
    raise ValueError("this start of the adapters is not built, or changes the base")


def optimizer(value: Any) -> str:
    if (name := text(value).lower()) in OPTIMIZERS:
        return OPTIMIZERS[name]
    raise ValueError("this optimizer is not built; its learning rate may not suit ours")


def schedule(value: Any) -> str:
    if (name := text(value).lower()) in SCHEDULES:
        return SCHEDULES[name]
    raise ValueError("this course of the learning rate is not built")


def scheduler(draft: Draft, key: str, value: Any) -> None:
    """The course of the learning rate. Theirs called `constant` has no warm-up, whatever else is set."""
    if value == "constant":
        draft.carry(key, "train.lr_scheduler", "constant", "without warm-up")
        draft.values["train.warmup_ratio"] = 0.0
    else:
        carried("train.lr_scheduler", schedule)(draft, key, value)


def attention(draft: Draft, key: str, value: Any) -> None:
    if value in ("eager", "sdpa"):
        draft.carry(key, "model.attention", value)
    else:
        draft.ours(key, "the fastest exact attention that works here is chosen by a trial")


_FP16 = ("fp16", "float16", "half")


def sixteen_bit(draft: Draft, key: str, value: Any) -> None:
    """bf16, fp16 and their like. What is on a GPU of theirs is what is chosen here."""
    wants_bf16 = "bf" in key or value in ("bf16", "bfloat16")
    wants_fp16 = (key.rpartition(".")[2] in ("fp16", "float16") and value in (True, "true", "yes", 1)) or value in _FP16
    on = value not in (False, "false", "no", 0)
    if not on or wants_bf16 or value == "auto":
        draft.ours(key, "training is in bf16, on a GPU without it in fp16")
    elif wants_fp16:
        draft.carry(key, "model.dtype", "fp16", "with a scaled loss, and adapters that the optimizer keeps in fp32")
    else:
        draft.leave(key, value, "training is in bf16 or fp16 here, not in fp32")


def checkpointing(draft: Draft, key: str, value: Any) -> None:
    """Whether activations are recomputed. What is kept on the host or done by a kernel of theirs is recomputed here."""
    if isinstance(value, str) and value.lower() in ("unsloth", "offload", "offload_disk", "mlx"):
        draft.carry(key, "train.gradient_checkpointing", True, f"recomputed; {value.lower()!r} is theirs alone")
    elif isinstance(value, str) and value.lower() == "none":
        draft.carry(key, "train.gradient_checkpointing", False)
    else:
        carried("train.gradient_checkpointing", switch)(draft, key, value)


def warmup_steps(draft: Draft, key: str, value: Any) -> None:
    """A number of steps: a part of the run only where the run's steps are known."""
    try:
        found = number(value)
    except ValueError as error:
        draft.leave(key, value, f"train.warmup_ratio: {error}")
        return
    steps = draft.values.get("train.max_steps")
    if found == 0 or 0 < found < 1:
        draft.carry(key, "train.warmup_ratio", found)
    elif steps and found <= steps:
        draft.carry(key, "train.warmup_ratio", round(found / steps, 4), f"{found:g} of {steps} steps")
    else:
        draft.leave(key, value, "train.warmup_ratio is a part of the run, whose steps are not known here: set it")


def warmup(draft: Draft, table: dict[str, Any]) -> None:
    """Take out and tell what decides no warm-up, in whatever order the keys stand.

    As transformers has it: a course called `constant` has none; steps above 0 go before the ratio; 0 steps mean it.
    """
    by_name = {key.rpartition(".")[2]: key for key in table}
    steps, ratio = by_name.get("warmup_steps"), by_name.get("warmup_ratio")
    for course in (by_name.get(name) for name in ("lr_scheduler", "lr_scheduler_type")):
        if course is not None and table[course] == "constant":
            for key in (one for one in (steps, ratio) if one is not None):
                draft.ours(key, f"{as_shown(key, table.pop(key))}: a course called constant has no warm-up")
            return
    if steps is None or ratio is None:
        return
    try:
        found = number(table[steps])
    except ValueError:
        return  # its own rule tells it
    if found == 0:
        draft.ours(steps, f"{as_shown(steps, table.pop(steps))}: {ratio} decides")
    elif found > 0:
        draft.ours(ratio, f"{as_shown(ratio, table.pop(ratio))}: {steps} goes before it")


def max_steps(draft: Draft, key: str, value: Any) -> None:
    """Zero and less are none; with it the epochs say nothing."""
    try:
        found = whole(value)
    except ValueError as error:
        draft.leave(key, value, f"train.max_steps: {error}")
        return
    if found > 0:
        draft.carry(key, "train.max_steps", found)
    else:
        draft.ours(key, "epochs decide")


def every(to: str, end: str) -> Rule:
    """An interval in steps; a part of the run is none, and 0 is `end`."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value in (0, 0.0, "0"):
            draft.ours(key, end)
        else:
            carried(to, positive)(draft, key, value)

    return rule


def batches(draft: Draft, micro: tuple[str, Any], steps: tuple[str, Any]) -> None:
    """Rows of a forward pass and passes of a step, each by its key: theirs multiply, ours are the product."""
    (micro_key, micro_rows), (steps_key, passes) = micro, steps
    try:
        rows, times = positive(micro_rows), positive(passes)
    except ValueError as error:
        draft.leave(f"{micro_key} × {steps_key}", f"{micro_rows} × {passes}", f"train.batch_size: {error}")
        return
    draft.carry(micro_key, "train.micro_batch_size", rows)
    draft.carry(steps_key, "train.batch_size", rows * times, f"{rows} × {times}, of one GPU")


# Keys of transformers' TrainingArguments, which LLaMA-Factory and TRL share, and axolotl in part.
SHARED = {
    "learning_rate": carried("train.learning_rate", number),
    "lr_scheduler_type": scheduler,
    "warmup_steps": warmup_steps,
    "warmup_ratio": carried("train.warmup_ratio", number),
    "weight_decay": carried("train.weight_decay", number),
    "max_grad_norm": carried("train.max_grad_norm", number),
    "optim": carried("train.optimizer", optimizer),
    "num_train_epochs": carried("train.epochs", number),
    "max_steps": max_steps,
    "seed": carried("train.seed", whole),
    "neftune_noise_alpha": carried("train.neftune_alpha", number),
    "gradient_checkpointing": checkpointing,
    "gradient_checkpointing_kwargs": ours(SPEED),
    "save_steps": every("checkpoint.every_steps", "saved at the end, and every 50 steps or 10 minutes"),
    "save_total_limit": carried("checkpoint.keep", positive),
    "eval_steps": every("eval.every_steps", "evaluated at the end"),
    "trust_remote_code": off("code from a model's folder never runs here"),
    "output_dir": ours("the run stands in output.dir, under its recipe's name"),
    **dict.fromkeys(("bf16", "fp16", "pure_bf16", "torch_dtype", "dtype", "bfloat16", "float16"), sixteen_bit),
    **dict.fromkeys(("tf32", "torch_compile", "use_liger_kernel", "dataloader_num_workers"), ours(SPEED)),
    **dict.fromkeys(("dataloader_pin_memory", "dataloader_prefetch_factor", "save_safetensors"), ours(SPEED)),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size", "torch_compile_mode"), ours(SPEED)),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy"), ours("by steps")),
    **dict.fromkeys(("logging_steps", "logging_first_step"), ours("each step is an event")),
    **dict.fromkeys(("overwrite_output_dir", "logging_dir", "run_name"), ours("nothing is overwritten")),
    **dict.fromkeys(
        ("resume_from_checkpoint", "auto_resume_from_checkpoints"), ours("mode='resume' goes on with a run")
    ),
    **dict.fromkeys(("do_train", "do_eval", "remove_unused_columns"), ours("as here")),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "ddp"), off(ONE_GPU)),
    **dict.fromkeys(("ddp_timeout", "ddp_find_unused_parameters", "local_rank", "accelerator_config"), ours(ONE_GPU)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), left("β are 0.9 and 0.999, ε is 1e-8")),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"), off("nothing is uploaded")),
    "group_by_length": off("rows are shuffled, and packed"),
    **dict.fromkeys(("label_smoothing_factor", "lr_scheduler_kwargs", "optim_args"), off("not built")),
    "report_to": tracking.report_to,
}
