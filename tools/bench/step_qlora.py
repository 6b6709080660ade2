"""Our stack's side of `step.py`."""

from __future__ import annotations

import time
from typing import Any

import torch
from step_measure import Settings, figures_of, resident_bytes, synchronize, token_rows

from qlora.batch import Batch
from qlora.events import Sinks
from qlora.model import adapters, load
from qlora.model.cpu_matmul import fast_matmul
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts, forward_backward, set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from qlora.step.optimizer import AdapterOptimizer
from qlora.training.setup import pick_device


def run(settings: Settings) -> dict[str, Any]:
    """The step of qlora.step, as the trainer runs it."""
    before = resident_bytes()
    device = pick_device()
    base = resolve(settings.base, "main", Sinks())
    model = load.load_base(base, QuantizationSection(), "auto", device, Sinks())
    peft_model = adapters.attach(model, LoraSection(r=settings.r, alpha=32), 0)
    causal_lm = peft_model.get_base_model()
    set_gradient_checkpointing(causal_lm, settings.gradient_checkpointing, keep_random_state=False)
    parts = CausalParts.of(causal_lm)
    optimizer = AdapterOptimizer(adapters.trainable(peft_model), settings.optimizer, 0.0)
    micro_batches = []
    for ids in token_rows(settings, causal_lm.config.get_text_config().vocab_size):
        ids_BS = torch.tensor(ids)
        weights = torch.ones(ids_BS.shape)
        weights[:, -1] = 0
        positions = torch.arange(settings.length).repeat(settings.rows, 1)
        zeros, targets = torch.zeros_like(ids_BS), torch.roll(ids_BS, -1, 1)
        trained = weights.flatten().nonzero().squeeze(1)
        micro_batches.append(Batch(ids_BS, positions, zeros, targets, weights, trained).to(device))
    objective = SupervisedObjective()
    step_weight = sum(objective.weight(batch) for batch in micro_batches)
    seconds = []
    peft_model.train()
    with fast_matmul(device):
        for _ in range(settings.steps + 1):
            synchronize(device.type)
            began = time.perf_counter()
            loss = sum(forward_backward(parts, batch, objective, step_weight) for batch in micro_batches)
            optimizer.clip(optimizer.gradient_norm(), 1.0)
            optimizer.step(1e-4)
            synchronize(device.type)
            seconds.append(time.perf_counter() - began)
    return figures_of(settings, seconds[1:], float(loss) / step_weight, before, device.type)
