"""Answers as a model may have drawn them, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora.data.layout import Layout
from qlora.data.token_cache import PreparedSplit, TokenRow
from qlora.recipe.sections import DataSection, SourceSection, TrainSection
from qlora.training.answered import Answer, AnsweredBatches

# Tokens of prompt and answer, and whether the answer ended by itself: two groups of three.
LENGTHS = [(5, 4, True), (5, 9, True), (5, 12, False), (7, 1, True), (7, 3, True), (7, 8, False)]
REWARDS = [0.0, 1.0, 0.25, 1.0, 1.0, 0.5]


def train_section(**keys: Any) -> TrainSection:
    return TrainSection(**{"objective": "grpo", "num_generations": 3, "max_completion_length": 12, **keys})


def drawn(advantages: Sequence[float], seed: int = 0) -> list[Answer]:
    """Answers of random tokens, with log-probabilities near to what a tiny random model says."""
    generator, found = torch.Generator().manual_seed(seed), []
    for at, (asked, count, ended) in enumerate(LENGTHS):
        prompt = torch.randint(10, 380, (asked,), generator=torch.Generator().manual_seed(at // 3))
        told = (-6 + 0.4 * torch.randn(3, count, generator=generator)).tolist()
        found.append(
            Answer(
                row=at // 3,
                number=at % 3,
                prompt_ids=tuple(prompt.tolist()),
                token_ids=tuple(torch.randint(10, 380, (count,), generator=generator).tolist()),
                ended=ended,
                logprobs=tuple(told[0]),
                advantage=advantages[at],
                reference=tuple(told[1]),
                old=tuple(told[2]),
            )
        )
    return found


def batches_over(
    answers: Sequence[Answer], train: TrainSection, max_length: int = 64, layout: Layout | None = None
) -> AnsweredBatches:
    """Of two rows whose prompts are those of the answers, and whose own answers are of two tokens."""
    prompts = {answer.row: answer.prompt_ids for answer in answers}
    rows = [TokenRow([*ids, 1, 2], [0.0] * len(ids) + [1.0] * 2) for _, ids in sorted(prompts.items())]
    split = PreparedSplit(
        rows, [len(row.input_ids) for row in rows], [2] * len(rows), ["a:1", "a:2"][: len(rows)], [0] * len(rows)
    )
    data = DataSection(train=(SourceSection(path="a"),), max_length=max_length)
    of_rows: tuple[Callable[[int], tuple[int, ...]], Any] = (prompts.__getitem__, lambda _: answers)
    return AnsweredBatches.of(split, data, train, 0, layout or Layout(), of_rows)
