"""What a run of preference measures beside its loss: margins, accuracies and divergences, of steps and evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.events import Preferred, Sink
from qlora.export.verify.fidelity import MOST_TOKENS
from qlora.model.weight_receiving import device_of
from qlora.step.forward import CausalParts, batch_logprobs, evaluating, hidden_states
from qlora.step.group_relative import GroupObjective
from qlora.step.loss import Objective, SupervisedObjective
from qlora.step.objectives import Figures, PreferenceObjective, Share

Began = Callable[[], AbstractContextManager[bool]]  # inside, the model is what the run began with, if that is known


def begin(objective: Objective, batches: Sequence[Batch], model: Any, parts: CausalParts, share: Share) -> None:
    """Before the micro-batches of a step, or of an evaluation: what the objective must know of all of them."""
    if isinstance(objective, GroupObjective):
        objective.begin()
    if not isinstance(objective, PreferenceObjective):
        return
    device = device_of(model.get_base_model())
    with evaluating(model):
        objective.begin(batches, lambda batch: batch_logprobs(parts, batch.to(device)), share)


def seen_by(objective: Objective) -> list[Tensor] | None:
    """Where an objective of preference keeps the figures of each micro-batch since `begin`; None of supervised rows."""
    return objective.seen if isinstance(objective, PreferenceObjective) else None


def figures(objective: Objective, step: int, evaluated: bool = False, kl: float | None = None) -> Preferred | None:
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
    marked = seen.compared == seen.better + seen.worse  # answers by themselves, without a better or a worse one
    likelier = None if marked else seen.likelier / seen.compared
    return Preferred(step, evaluated, round(seen.compared), accuracy, margin, better, worse, divergence, kl, likelier)


def kl_to_reference(
    objective: Objective, model: Any, parts: CausalParts, batches: Iterable[Batch], began: Began
) -> float | None:
    """Mean KL of the model from the one that the run began with, in nats a token, over the whole vocabulary and the
    trained tokens of the first batches; None of supervised rows, of a trained head, and where it is not known."""
    if not isinstance(objective, PreferenceObjective) or any(one.requires_grad for one in parts.head.parameters()):
        return None
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            placed = batch.to(device_of(model.get_base_model()))
            here_TD = _hidden(parts, placed)
            with began() as known:
                if not known:
                    return None
                there_TD = _hidden(parts, placed)
            few = max(1, parts.chunk_tokens // 4)  # of logits four copies live at once
            for start in range(0, len(here_TD), few):
                part = slice(start, start + few)
                p_CV, q_CV = (_vocabulary_logprobs(parts, one[part]) for one in (here_TD, there_TD))
                total += float((p_CV.exp() * (p_CV - q_CV)).sum())
            count += len(here_TD)
            if count >= MOST_TOKENS:
                break
    return total / count if count else None


def _hidden(parts: CausalParts, batch: Batch) -> Tensor:
    return hidden_states(parts, batch).flatten(0, 1).index_select(0, batch.trained_T)


def _vocabulary_logprobs(parts: CausalParts, hidden_CD: Tensor) -> Tensor:
    logits_CV = parts.head(hidden_CD.to(next(parts.head.parameters()).dtype))
    logits_CV = logits_CV if parts.transform is None else parts.transform(logits_CV)
    return torch.log_softmax(logits_CV.float(), dim=-1)


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
    """Of a supervised loss; that of preference, or of rewards, is none of words."""
    if loss is None or not isinstance(objective, SupervisedObjective):
        return None
    return math.exp(min(loss, 700.0))
