"""Answers that are drawn, each with random numbers of its own: what a group of answers to one question is made of.

A token is drawn from the whole distribution, logits over `temperature`, by the inverse of its cumulative sum. The sum
is one of whole numbers: it comes out the same in whatever order a GPU adds them up, where one of floats does not
(torch's float cumsum has no deterministic form on CUDA). What is drawn follows from the logits and from the answer's
name alone, so that it can be drawn again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.model.generate import Asked, answers_to

PARTS = 2.0**31  # that a probability is counted in: tokens of less than 2.3e-10 are never drawn
DRAW_BITS = 31  # of a random number: times a sum of PARTS it is below 2^63


@dataclass(frozen=True)
class Drawn:
    """An answer. T tokens, its end token among them where it has `ended` by itself; log-probabilities in nats, of the
    distribution that they were drawn from."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool


def draw(
    model: Any, prompts: Sequence[Sequence[int]], names: Sequence[str], temperature: float, asked: Asked
) -> list[Drawn]:
    """One answer to each prompt; `names` are what each one's random numbers follow from."""
    drawing = [_Answer(name, asked.max_new_tokens) for name in names]

    def choosing(chosen: Sequence[int]) -> _Batch:
        return _Batch([drawing[index] for index in chosen], temperature)

    answers = answers_to(model, prompts, asked, choosing)
    return [row.drawn(len(answer), asked.max_new_tokens) for row, answer in zip(drawing, answers, strict=True)]


def chosen_of(logits_BV: Tensor, numbers_B1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The tokens that random numbers of DRAW_BITS bits mean, and their log-probabilities in nats, fp32: both [B, 1]."""
    logprobs_BV = (logits_BV.float() / temperature).log_softmax(dim=-1)
    sums_BV = logprobs_BV.double().exp_().mul_(PARTS).round_().long().cumsum(dim=-1)
    # Of a sum of about PARTS, the whole number below its share; a token's own part is not empty where it is chosen.
    wanted_B1 = (sums_BV[:, -1:] * numbers_B1) >> DRAW_BITS
    tokens_B1 = torch.searchsorted(sums_BV, wanted_B1, right=True)
    return tokens_B1, logprobs_BV.gather(1, tokens_B1)


class _Answer:
    """Random numbers of one answer, and what was drawn with them so far."""

    def __init__(self, name: str, most_tokens: int) -> None:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
        # Numpy promises the bits of Philox for a key, not what is made of them (NEP 19).
        self.numbers = np.random.Philox(key=key).random_raw(most_tokens) >> np.uint64(64 - DRAW_BITS)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []

    def drawn(self, length: int, most_tokens: int) -> Drawn:
        """Of an answer of `length` tokens without its end token, which was drawn where there was room for one more."""
        count = min(length + 1, most_tokens)
        return Drawn(tuple(self.tokens[:count]), tuple(self.logprobs[:count]), length < most_tokens)


class _Batch:
    """A `generate.Choose` of several answers."""

    def __init__(self, answers: Sequence[_Answer], temperature: float) -> None:
        self.answers, self.temperature = answers, temperature

    def __call__(self, logits_BV: Tensor, column: int) -> Tensor:
        numbers = torch.tensor([[int(answer.numbers[column])] for answer in self.answers], device=logits_BV.device)
        tokens_B1, logprobs_B1 = chosen_of(logits_BV, numbers, self.temperature)
        for answer, token, logprob in zip(self.answers, tokens_B1.tolist(), logprobs_B1.tolist(), strict=True):
            answer.tokens.append(token[0])
            answer.logprobs.append(logprob[0])
        return tokens_B1[:, 0]
