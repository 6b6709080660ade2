"""What a run of preference measures beside its loss: margins, accuracies and divergences, of steps and evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.events import Preferred, Sink
from qlora.step.forward import CausalParts, batch_logprobs, evaluating
from qlora.step.loss import Objective
from qlora.step.objectives import Figures, PreferenceObjective


def begin(objective: Objective, batches: Iterable[Batch], model: Any, parts: CausalParts, device: torch.device) -> None:
    """Before the micro-batches of a step, or of an evaluation: what the objective must know of all of them."""
    if not isinstance(objective, PreferenceObjective):
        return
    with evaluating(model):
        objective.begin(batches, lambda batch: batch_logprobs(parts, batch.to(device)))


def figures(objective: Objective, step: int, evaluated: bool = False) -> Preferred | None:
    """The event of what the objective has seen since `begin`; None of supervised rows."""
    if not isinstance(objective, PreferenceObjective) or not objective.seen:
        return None
    seen = Figures.of(objective.seen)
    better, worse = (
        total / count if count else None
        for total, count in ((seen.better_reward, seen.better), (seen.worse_reward, seen.worse))
    )
    margin = None if better is None or worse is None else better - worse
    divergence = float(objective.divergence) if objective.keys.objective == "kto" else None
    accuracy = seen.right / seen.compared
    return Preferred(step, evaluated, round(seen.compared), accuracy, margin, better, worse, divergence)


def emit(objective: Objective, step: int, sink: Sink) -> None:
    """Of the step that was done."""
    if (event := figures(objective, step)) is not None:
        sink.emit(event)


def plain_losses(objective: Objective, losses: Sequence[tuple[Tensor, float]]) -> Sequence[tuple[Tensor, float]]:
    """Of an evaluation's micro-batches, the summed loss of all tokens of all answers: what an export measures again,
    whatever the objective was."""
    if not isinstance(objective, PreferenceObjective):
        return losses
    seen = [Figures.of([values]) for values in objective.seen]
    return [(torch.tensor(one.loss, dtype=torch.float64), one.tokens) for one in seen]


def perplexity(objective: Objective, loss: float | None) -> float | None:
    """Of a supervised loss; that of preference is none of words."""
    if loss is None or isinstance(objective, PreferenceObjective):
        return None
    return math.exp(min(loss, 700.0))
