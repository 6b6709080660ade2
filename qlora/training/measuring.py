"""What the processes of a run share of an evaluation: losses of micro-batches, answers to batches of prompts.

Each micro-batch and each batch of prompts is done by one process, whole, so that every figure is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.data.chat import ChatTokenizer
from qlora.events import Progress, Sink
from qlora.export.verify.evaluation import EvalRows, summed_loss
from qlora.model import generate
from qlora.model.weight_receiving import device_of
from qlora.step.forward import CausalParts, evaluating
from qlora.step.loss import Objective
from qlora.training import preferences
from qlora.training.dividing import Division
from qlora.training.questions import Question


class Told(NamedTuple):
    """Who may end it, by raising, and who is told how far it is."""

    check_stop: Callable[[], None]
    sink: Sink


class Asked(NamedTuple):
    """Questions, how many of them at once, and how many tokens an answer may have."""

    questions: Sequence[Question]
    at_once: int
    limit: int
    chat: ChatTokenizer


def losses(
    model: Any, parts: CausalParts, objective: Objective, rows: EvalRows, told: Told, shares: Division
) -> list[tuple[Tensor, float]]:
    """Of each micro-batch its summed loss, fp64, and what it counts; what an objective of preference has seen of all of
    them is in it then."""
    device = device_of(model.get_base_model())
    seen, done, packs = preferences.seen_by(objective), 0, sum(map(len, rows.micro_batches))

    def measured(batch: Batch) -> Tensor:
        nonlocal done
        told.check_stop()
        loss, weight = summed_loss(parts, objective, batch, device)
        done += len(batch.input_ids_BS)
        told.sink.emit(Progress("evaluate", done, packs))
        return torch.cat([loss.new_tensor([weight]), loss[None], *(seen or ())[-1:]])

    with evaluating(model):
        preferences.begin(objective, rows, model, parts, shares.shared)
        found = shares.shared(rows, measured)
    if seen is not None:
        seen[:] = [one[2:] for one in found]
    return [(one[1], float(one[0])) for one in found]


def answers(model: Any, asked: Asked, told: Told, shares: Division) -> list[str]:
    """Greedy answers as text."""
    prompts, chat = [question.prompt_ids for question in asked.questions], asked.chat
    together = generate.asked_together(prompts, asked.at_once)
    total = len(prompts) * asked.limit

    def watch(done: int) -> None:
        told.check_stop()
        told.sink.emit(Progress("answer", done, total, "tokens"))

    def answered(number: int) -> Tensor:
        before = number * asked.at_once * asked.limit
        texts = [prompts[index] for index in together[number]]
        how = (chat.end_token_ids, asked.limit, chat.pad_id, asked.at_once, lambda done, _: watch(before + done))
        given = generate.greedy(model, texts, *how)
        return torch.tensor([one for ids in given for one in (len(ids), *ids)], dtype=torch.float64)

    found = [""] * len(prompts)
    for members, given in zip(together, shares.shared(range(len(together)), answered), strict=True):
        values = iter(given.long().tolist())
        for index in members:
            ids = list(islice(values, next(values)))
            found[index] = chat.tokenizer.decode(ids, skip_special_tokens=True).strip()
    watch(total)
    return found
