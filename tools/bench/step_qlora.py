"""Our stack's side of `step.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import bitsandbytes  # noqa: F401  (the other stack has these before it counts too)
import peft  # noqa: F401
import torch
from step_measure import Settings, figures_of, pairs_of, resident_bytes, synchronize, token_rows
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from transformers import AutoModelForCausalLM  # noqa: F401

from qlora import heap, numerics, run_numerics
from qlora.batch import Batch
from qlora.data.chat import TokenRow
from qlora.data.loader import collate
from qlora.data.token_cache import Preference, PreparedSplit
from qlora.device import is_card, release
from qlora.events import Sinks
from qlora.model import adapters, load
from qlora.model.base_folder import BaseFolder
from qlora.model.cpu_matmul import fast_matmul, has_bf16_products
from qlora.model.resolve import resolve
from qlora.objective_keys import ObjectiveKeys
from qlora.recipe.reading import recipe_of_base
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts, batch_logprobs, evaluating, forward_backward
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.objectives import PreferenceObjective, answers_of, objective_of
from qlora.step.optimizer import AdapterOptimizer
from qlora.training.setup import pick_device


def run(settings: Settings) -> dict[str, Any]:
    """The step of qlora.step, as the trainer runs it: with what a new run decides on this machine."""
    device = pick_device()
    if not is_card(device):
        heap.settle()
    before = resident_bytes()
    base = resolve(settings.base, "main", Sinks())
    with numerics.in_force(run_numerics.decide(recipe_of_base(settings.base), base, device, None)):
        return measured(settings, base, device, before)


def measured(settings: Settings, base: BaseFolder, device: torch.device, before: int) -> dict[str, Any]:
    """Speed and peak of `settings.steps` steps; `before`, what the process held until now."""
    model = load.load_base(base, QuantizationSection(), "auto", device, Sinks())
    peft_model = adapters.attach(model, LoraSection(r=settings.r, alpha=32), 0)
    causal_lm = peft_model.get_base_model()
    set_gradient_checkpointing(causal_lm, settings.gradient_checkpointing, keep_random_state=False)
    parts = CausalParts.of(causal_lm)
    optimizer = AdapterOptimizer(adapters.trainable(peft_model), settings.optimizer, 0.0)
    vocabulary = causal_lm.config.get_text_config().vocab_size
    made = [
        pairs(settings, rows) if settings.objective == "dpo" else micro_batch(rows, settings.documents)
        for rows in token_rows(settings, vocabulary)
    ]
    micro_batches = [batch.to(device) for batch in made]
    objective = objective_of(ObjectiveKeys.model_validate({"objective": settings.objective}))
    if settings.objective == "dpo":  # asked once before a run, and kept
        with evaluating(peft_model), peft_model.disable_adapter():
            told = [answers_of(batch_logprobs(parts, batch), batch).logprobs_R for batch in micro_batches]
        micro_batches = [replace(batch, reference_R=one) for batch, one in zip(micro_batches, told, strict=True)]
    release(device)  # and its peak is counted from here
    step_weight = sum(objective.weight(batch) for batch in micro_batches)
    seconds = []
    peft_model.train()

    def step() -> Tensor:
        if isinstance(objective, PreferenceObjective):
            objective.seen = []
        loss = sum(forward_backward(parts, batch, objective, step_weight) for batch in micro_batches)
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(1e-4)
        return torch.as_tensor(loss)

    with fast_matmul(device):
        for _ in range(settings.steps + 1):
            synchronize(device.type)
            began = time.perf_counter()
            loss = step()
            synchronize(device.type)
            seconds.append(time.perf_counter() - began)
        figures = figures_of(settings, seconds[1:], float(loss) / step_weight, before, device.type)
        if is_card(device):
            return figures
        # Of products added in place torch knows no count; its own of the others is asked by shapes.
        by_shapes = addmm_flop.__wrapped__  # type: ignore[attr-defined]
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: by_shapes})
        with counter:
            step()
    reached = counter.get_total_flops() / statistics.median(seconds[1:])
    in_fp32, fastest = products_per_second()
    return {**figures, "share_of_limit": round(reached / fastest, 3), "share_of_fp32": round(reached / in_fp32, 3)}


def products_per_second() -> tuple[float, float]:
    """FLOP/s of this processor's products of 1,024 x 1,024 matrices: in float32, and in the faster one of two types."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16) if has_bf16_products() else (torch.float32,):
        one = torch.randn(1024, 1024).to(dtype)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(one, one)
            seconds.append(time.perf_counter() - began)
        rates.append(2 * 1024**3 / min(seconds))
    return rates[0], max(rates)


def micro_batch(rows: Sequence[Sequence[int]], documents: int) -> Batch:
    """The rows as the trainer's own packs, each of as many documents, every token trained but the first of each."""
    parts = [list(part) for row in rows for part in split_evenly(row, documents)]
    tokens = [TokenRow(part, [0.0, *[1.0] * (len(part) - 1)]) for part in parts]
    lengths = [len(part) for part in parts]
    trained = [length - 1 for length in lengths]
    split = PreparedSplit(tokens, lengths, trained, [""] * len(parts), [0] * len(parts))
    packs = [tuple(range(first, first + documents)) for first in range(0, len(parts), documents)]
    return collate(split, packs, 0, len(rows[0]))


def pairs(settings: Settings, rows: Sequence[Sequence[int]]) -> Batch:
    """Each row as a pair, whose two sides share a pack of twice its length."""
    tokens = []
    for row in rows:
        question, *answers = pairs_of(settings, row)
        for answer, sign in zip(answers, (1.0, -1.0), strict=True):
            tokens.append(TokenRow([*question, *answer], [*[0.0] * len(question), *[sign] * len(answer)]))
    lengths, trained = [settings.length] * len(tokens), [settings.answer] * len(tokens)
    split = PreparedSplit(tokens, lengths, trained, [""] * len(tokens), [0] * len(tokens))
    split = replace(split, preference=Preference(paired=True))
    return collate(split, [(first, first + 1) for first in range(0, len(tokens), 2)], 0, 2 * settings.length)


def split_evenly(row: Sequence[int], count: int) -> list[Sequence[int]]:
    bounds = [len(row) * number // count for number in range(count + 1)]
    return [row[begin:end] for begin, end in pairwise(bounds)]
