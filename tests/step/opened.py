"""A small base with adapters, ready to be trained; and what a base takes that shares keys and values across layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora.events import Sinks
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection

CPU = torch.device("cpu")
LORA = LoraSection(r=4, dropout=0.1)
# What shares keys and values across layers, or hands each layer an embedding of its own.
GEMMA3N = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 384,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "num_hidden_layers": 4,
    "intermediate_size": [128] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "head_dim": 16,
    "sliding_window": 12,
}


def opened(folder: Path, lora: LoraSection = LORA) -> Any:
    model = load.load_base(resolve(str(folder), "main", Sinks()), QuantizationSection(), "auto", CPU, Sinks())
    attached = adapters.attach(model, lora, 0)
    with torch.no_grad():
        for number, parameter in enumerate(adapters.trainable(attached).values()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.copy_(0.05 * drawn)
    return attached.train()
