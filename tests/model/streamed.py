"""Models whose layers come and go, for tests: opened, with adapters, and a step of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.events import Sinks
from qlora.memory.simulation import Workload
from qlora.model import adapters, load
from qlora.model.cpu_matmul import fast_matmul
from qlora.model.resolve import resolve
from qlora.model.weight_receiving import Place
from qlora.model.weight_streaming import Ring
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts, forward_backward, seed_micro_batch
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from tests.families import make_base
from tests.memory.counted import real_batch

CPU = torch.device("cpu")
LAYERS = 4
LORA = LoraSection(r=4, dropout=0.1)
STREAMED = Place(streams=True, host_embedding=True)


def opened(base: Path, place: Place, quantization: QuantizationSection | None = None, attention: str = "auto") -> Any:
    found = resolve(str(base), "main", Sinks())
    return load.load_base(found, quantization or QuantizationSection(), attention, CPU, Sinks(), place=place)


def tuned(
    base: Path,
    place: Place,
    lora: LoraSection = LORA,
    quantization: QuantizationSection | None = None,
    attention: str = "auto",
) -> Any:
    model = adapters.attach(opened(base, place, quantization, attention), lora, 0, functions="qlora")
    with torch.no_grad():
        for number, parameter in enumerate(adapters.trainable(model).values()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_((0.05 * drawn).to(parameter.dtype))
    set_gradient_checkpointing(model.get_base_model(), True, keep_random_state=True)
    return model.train()


def step(model: Any, micro_batches: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    causal_lm, losses = model.get_base_model(), []
    model.zero_grad()
    with fast_matmul(CPU):
        for micro_step in range(micro_batches):
            seed_micro_batch(7, 3, micro_step)
            batch = real_batch(Workload(2, 40 - 8 * micro_step), causal_lm.config.get_text_config().vocab_size)
            losses.append(forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), 9.0, 5.0))
    found = {name: parameter.grad.clone() for name, parameter in adapters.trainable(model).items()}
    return torch.stack(losses), found


def base_of(family: str, folder: Path, layers: int = LAYERS) -> Path:
    return make_base(family, folder, overrides={"num_hidden_layers": layers, "layer_types": None})


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer leaves behind holds no weight of anybody's."""
    let_go = Ring.let_go

    def poisoned(ring: Ring, layer: int) -> None:
        slot = ring._slot_of(layer)
        let_go(ring, layer)
        assert slot is not None
        slot.blob.fill_(0xFF)
        slot.layer = None

    monkeypatch.setattr(Ring, "let_go", poisoned)
