"""Unsloth's side of `step.py`: its own model and adapters in TRL's trainer, as its documentation says. It wants a GPU.

Unsloth rewrites transformers and TRL when it is imported, so it comes before them, and in a process of its own.
"""

from __future__ import annotations

from typing import Any

from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip
import torch
from step_measure import Settings, resident_bytes
from step_trl import trained

# What it adapts by itself, and what all linear layers of the shapes of step.py are.
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(settings: Settings) -> dict[str, Any]:
    """A 4-bit base with LoRA on every linear layer; layers recomputed its own way, inputs on the host."""
    before = resident_bytes()
    recompute = "unsloth" if settings.theirs_checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=settings.base,
        max_seq_length=settings.length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=recompute,
        trust_remote_code=False,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.r,
        target_modules=LINEAR_LAYERS,
        lora_alpha=32,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=recompute,
    )
    return trained(model, settings, before, None)
