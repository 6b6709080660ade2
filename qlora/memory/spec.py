"""What a run's model is made of: as the run under way has decided, else as a new one on such a machine would."""

from __future__ import annotations

from typing import Any

import torch

from qlora import numerics
from qlora.loss_scale import FP16
from qlora.memory.baselines import BASELINES, Baseline
from qlora.memory.hardware import Machine
from qlora.memory.simulation import ModelSpec
from qlora.model import experts, precision
from qlora.model.attention import kernel_of
from qlora.model.attention_choice import assumed, assumed_on_cpu
from qlora.model.meta_model import choose_attention
from qlora.model.weight_receiving import Place
from qlora.recipe.reading import Recipe


def spec_of(text: Any, name: str, machine: Machine, baseline: Baseline, recipe: Recipe) -> ModelSpec:
    """Of the base with the configuration `text`; other stacks than ours are as `baseline` says, and compute in bf16."""
    ours = baseline == BASELINES["qlora"]
    run = numerics.of_run() if ours else None
    return ModelSpec(
        *(text, name, recipe.lora, recipe.quantization, recipe.model.attention, machine.device_type, baseline),
        kernel=_kernel(text, name, machine, recipe.model.attention) if ours else None,
        functions=run.functions if run is not None else None,
        loss_chunk=(run.loss_chunk or 0) if run is not None else None,
        head_block=(run.head_block or 0) if run is not None else 0,
        place=Place.of(recipe.memory) if ours else Place(),
        dtype=_dtype(machine, recipe.model.dtype) if ours else torch.bfloat16,
        experts=experts.of_run() if ours else None,
    )


def _dtype(machine: Machine, wanted: str) -> torch.dtype:
    if numerics.of_run() is not None:
        return precision.of_run()
    lacks_bf16 = machine.gpu is not None and not machine.gpu.computes_bf16
    return precision.DTYPES[FP16 if wanted == FP16 or lacks_bf16 else precision.BF16]


def _kernel(text: Any, name: str, machine: Machine, wanted: str) -> str | None:
    """What attends without a mask."""
    named, gpu, run = choose_attention(text, wanted, name), machine.gpu, numerics.of_run()
    if run is not None and run.attention is not None:
        return kernel_of(run.attention)
    if machine.device_type != "cuda":
        return assumed_on_cpu(text, named, wanted)
    return assumed(text, named, wanted, gpu.capability if gpu else 86)
