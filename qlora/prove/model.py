"""A model of random weights in NF4 with adapters, made on the device, and micro-batches of packed documents for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.data.chat import TokenRow
from qlora.data.loader import collate
from qlora.data.token_cache import PreparedSplit
from qlora.device import random_state_kept
from qlora.events import Sinks
from qlora.model import adapters, lora_functions
from qlora.model.attention_choice import settle
from qlora.model.made_up import load_random
from qlora.model.meta_model import build_unmatched, choose_attention
from qlora.prove.shapes import Shape, config_of
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step import head_loss
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.kernels import trial
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from qlora.step.optimizer import AdapterOptimizer

SEED = 11
ADAPTER_SPREAD = 0.01  # of B, which starts at zero otherwise: then A would have no gradient


@dataclass(frozen=True)
class Made:
    """A model that is ready for a step. `model` is peft's wrapper."""

    model: Any
    parts: CausalParts
    optimizer: AdapterOptimizer
    device: torch.device

    def gradient(self, *batches: Batch) -> list[Tensor]:
        """The gradient of the masters over all micro-batches, on the host; nothing of it is kept here."""
        weight = sum(SupervisedObjective().weight(batch) for batch in batches)
        for batch in batches:
            forward_backward(self.parts, batch.to(self.device), SupervisedObjective(), weight)
        found, masters = self.optimizer.gradients, self.optimizer.masters
        gradient = [found.get(key, torch.zeros_like(master)).cpu().clone() for key, master in masters.items()]
        self.optimizer.zero_gradients()
        return gradient

    def step(self, *batches: Batch) -> None:
        """One update from these micro-batches."""
        weight = sum(SupervisedObjective().weight(batch) for batch in batches)
        for batch in batches:
            forward_backward(self.parts, batch.to(self.device), SupervisedObjective(), weight)
        self.optimizer.clip(self.optimizer.gradient_norm(), 1.0)
        self.optimizer.step(1e-4)


@contextmanager
def make(
    shape: Shape,
    device: torch.device,
    attention: str = "auto",
    optimizer: str = "adamw_8bit",
    recompute: bool = True,
) -> Iterator[Made]:
    """The same numbers for the same arguments, whatever was drawn before; nothing holds the model after the block."""
    text = config_of(shape)
    model = build_unmatched(text, choose_attention(text, attention, shape.name), shape.name)
    with random_state_kept(device):
        torch.manual_seed(SEED)
        load_random(model, QuantizationSection(), device)
        settle(model, attention, device, Sinks())
        functions = lora_functions.choose(LoraSection(), None, trial.work(device))
        peft_model = adapters.attach(model, LoraSection(), SEED, functions=functions)
        trained = adapters.trainable(peft_model)
        with torch.no_grad():
            for name, parameter in trained.items():
                if "lora_B" in name:
                    parameter.normal_(0.0, ADAPTER_SPREAD)
    causal_lm = peft_model.get_base_model()
    set_gradient_checkpointing(causal_lm, recompute, keep_random_state=False)
    peft_model.train()
    own = AdapterOptimizer(trained, optimizer, 0.0)
    try:
        chunk = head_loss.chunk_of_run(causal_lm.config.vocab_size, device)
        parts = replace(CausalParts.of(causal_lm), loss_chunk=chunk)
        yield Made(peft_model, parts, own, device)
    finally:
        own.detach()  # parameters hold their hooks, and those the optimizer: no collector sees through torch's side


def documents(count: int, lengths: tuple[int, ...], vocabulary: int, seed: int = SEED) -> PreparedSplit:
    """`count` x `lengths` documents of random tokens, each token trained but the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths * count:
        ids = torch.randint(4, vocabulary, (length,), generator=generator).tolist()
        rows.append(TokenRow(ids, [0.0, *[1.0] * (length - 1)]))
    sizes = [len(row.input_ids) for row in rows]
    trained = [size - 1 for size in sizes]
    return PreparedSplit(rows, sizes, trained, [f"row {number}" for number in range(len(rows))], [0] * len(rows))


def packed(rows: int, length: int, vocabulary: int, seed: int = SEED) -> Batch:
    """A micro-batch of `rows` packs of up to `length` tokens: three documents each, and a few places of padding."""
    parts = (length // 2, length // 3, length - length // 2 - length // 3 - 5)
    split = documents(rows, parts, vocabulary, seed)
    packs = [tuple(range(3 * row, 3 * row + 3)) for row in range(rows)]
    return collate(split, packs, 0, length)
