"""A small base with adapters, ready to be trained."""

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


def opened(folder: Path, lora: LoraSection = LORA) -> Any:
    model = load.load_base(resolve(str(folder), "main", Sinks()), QuantizationSection(), "auto", CPU, Sinks())
    attached = adapters.attach(model, lora, 0)
    with torch.no_grad():
        for number, parameter in enumerate(adapters.trainable(attached).values()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.copy_(0.05 * drawn)
    return attached.train()
