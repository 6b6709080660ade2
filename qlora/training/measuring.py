"""What the processes of a run share beside its steps: losses of micro-batches, answers to batches of prompts.

Each micro-batch and each batch of prompts is done by one process, whole, so that every figure is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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

Numbers = Sequence[float]  # what is said of one answer: tokens, and what else is known of it
Answering = Callable[[Sequence[int], generate.Asked], Sequence[Numbers]]  # of the prompts with these numbers, one batch


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
    how = asked_of(chat, asked.limit, asked.at_once, told, "answer")
    found = greedy(model, prompts, how, shares)
    return [chat.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]


def asked_of(chat: ChatTokenizer, limit: int, at_once: int, told: Told, task: str) -> generate.Asked:
    """How prompts are answered in a run, where `told` is who may end it and hears of it."""

    def watch(done: int, total: int) -> None:
        told.check_stop()
        told.sink.emit(Progress(task, done, total, "tokens"))

    return generate.Asked(chat.end_token_ids, limit, chat.pad_id, at_once, watch)


def greedy(model: Any, prompts: Sequence[Sequence[int]], how: generate.Asked, shares: Division) -> list[list[int]]:
    """Greedy answers as tokens."""

    def answered(members: Sequence[int], how: generate.Asked) -> list[list[int]]:
        rest = (how.ends, how.max_new_tokens, how.pad_id, how.batch_size, how.watch)
        return generate.greedy(model, [prompts[number] for number in members], *rest)

    return [[int(token) for token in one] for one in in_batches(prompts, how, shares, answered)]


def in_batches(
    prompts: Sequence[Sequence[int]], how: generate.Asked, shares: Division, answering: Answering
) -> list[list[float]]:
    """What `answering` says of each prompt, in their order; which of them are a batch is as in one process."""
    together = generate.asked_together(prompts, how.batch_size)
    total = len(prompts) * how.max_new_tokens

    def answered(number: int) -> Tensor:
        before = number * how.batch_size * how.max_new_tokens
        own = replace(how, watch=lambda done, _: how.watch(before + done, total))
        given = answering(together[number], own)
        return torch.tensor([one for values in given for one in (len(values), *values)], dtype=torch.float64)

    found: list[list[float]] = [[] for _ in prompts]
    for members, given in zip(together, shares.shared(range(len(together)), answered), strict=True):
        values = iter(given.tolist())
        for index in members:
            found[index] = list(islice(values, int(next(values))))
    how.watch(total, total)
    return found
