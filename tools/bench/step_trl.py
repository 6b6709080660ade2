"""TRL's side of `step.py`: SFTTrainer and DPOTrainer with peft, as their documentation has it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from step_measure import Settings, figures_of, pairs_of, resident_bytes, synchronize, token_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


class Clock(TrainerCallback):  # type: ignore[misc]
    """The seconds of each step, and the losses."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize(self.device_type)
        self.began = time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what loading took is no step's

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device_type)
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, *_: Any, logs: Mapping[str, float] | None = None, **__: Any) -> None:
        self.losses.extend([logs["loss"]] if logs and "loss" in logs else [])


def run(settings: Settings) -> dict[str, Any]:
    """A 4-bit base with LoRA on every linear layer.

    On a GPU it computes in bf16. On a CPU it is given float32: most processors multiply bf16 matrices a hundred times
    more slowly, and float32 is what its own defaults give there.
    """
    before = resident_bytes()
    on_gpu = torch.cuda.is_available()
    model = load(settings.base, on_gpu)
    lora = LoraConfig(r=settings.r, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return trained(model, settings, before, lora)


def trained(model: Any, settings: Settings, before: int, lora: LoraConfig | None) -> dict[str, Any]:
    """What the trainer's steps take; `lora` for a model that has no adapters yet."""
    on_gpu = torch.cuda.is_available()
    vocabulary = model.config.get_text_config().vocab_size
    rows = [row for batch in token_rows(settings, vocabulary) for row in batch] * (settings.steps + 1)
    clock = Clock("cuda" if on_gpu else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = (SFTTrainer if settings.objective == "sft" else Pairs)(
            model=model,
            args=config_of(settings, scratch, on_gpu),
            train_dataset=Dataset.from_list([row_of(settings, row) for row in rows]),
            processing_class=tokenizer_of(settings.base, vocabulary),
            peft_config=lora,
            callbacks=[clock],
        )
        trainer.train()
    return figures_of(settings, clock.seconds[1:], clock.losses[-1], before, clock.device_type)


def row_of(settings: Settings, row: list[int]) -> dict[str, list[int]]:
    if settings.objective == "sft":
        return {"input_ids": row}
    return dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pairs_of(settings, row), strict=True))


class Pairs(DPOTrainer):  # type: ignore[misc]
    """Takes the tokens that it is given, of which it would make prompts and answers itself."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def load(base: str, on_gpu: bool) -> Any:
    dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=quantization,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": 0} if on_gpu else {"": "cpu"},
        trust_remote_code=False,
    )


def config_of(settings: Settings, scratch: str, on_gpu: bool) -> Any:
    own: dict[str, Any] = {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    if settings.objective != "sft":
        own = {"precompute_ref_log_probs": settings.asks_once}
    return (SFTConfig if settings.objective == "sft" else DPOConfig)(
        **own,
        output_dir=scratch,
        per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=settings.steps + 1,
        max_length=settings.length,
        gradient_checkpointing=settings.theirs_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim=OPTIMIZERS[settings.optimizer],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=on_gpu,
    )


def tokenizer_of(base: str, vocabulary: int) -> Any:
    """The base's tokenizer; for random weights, one that knows nothing but an end (the rows are tokens already)."""
    if (Path(base) / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": vocabulary - 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
