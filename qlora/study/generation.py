"""What a base writes after prompts that begin alike: sampled with a seed a row, or greedily, with the likeliest tokens.

What the prompts share (a passage, worked examples) is computed once and its keys and values are repeated for them,
where the family keeps nothing but keys and values; else each prompt is computed whole. Rows of a batch are computed as
each would be alone; which rows share one is the caller's to decide, and the same rows give the same bits again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora.model.generate import forward_parameters, keeps_keys_alone, name_of_cache
from qlora.model.weight_receiving import device_of
from qlora.step.forward import evaluating

TOP = 64  # log-probabilities kept of a token: 6 bytes each, and 0.957 of the mass at 32 even with a 135 M base
MAX_THOUGHTS = 512  # tokens; what thinks longer about one question is too slow to study with
SHARED_AT_LEAST = 16  # tokens: below this, computing a beginning apart costs more than it saves


@dataclass(frozen=True)
class Written:
    """What was written after one prompt. T tokens, and the place behind them where it ended by itself.

    `logprobs`: of each of the T tokens at temperature 1, in nats. `top_ids` (int32) and `top_logprobs` (float16):
    [T or T + 1, TOP], likeliest first; where a vocabulary has fewer, -1 and -inf.
    """

    token_ids: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float16]
    thoughts: int = 0  # tokens of thoughts that were written before, and are no part of it

    @property
    def mean_probability(self) -> float:
        """The geometric mean of the tokens' probabilities; 0 for an empty answer."""
        return geometric_mean(self.logprobs)

    @property
    def min_probability(self) -> float:
        return float(np.exp(min(self.logprobs))) if self.logprobs else 0.0


def geometric_mean(logprobs: Sequence[float]) -> float:
    """exp of the mean of log-probabilities in nats; 0 where there is none."""
    return float(np.exp(np.mean(logprobs))) if len(logprobs) else 0.0


@dataclass(frozen=True)
class Manner:
    """How is written. `temperature` 0: greedily. `ends`: tokens that end it, and are no part of it.

    `spoken_from`: of what was written so far, and whether that is all, where the words begin behind thoughts; None
    while that is open. Thoughts are no part of it either, may have MAX_THOUGHTS tokens of their own, and
    `max_new_tokens` counts from where they end.
    """

    max_new_tokens: int
    ends: frozenset[int]
    pad_id: int
    temperature: float = 0.0
    spoken_from: Callable[[Sequence[int], bool], int | None] = lambda *_: 0

    @property
    def most_tokens(self) -> int:
        return self.max_new_tokens + MAX_THOUGHTS


def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    manner: Manner,
    seeds: Sequence[int] = (),
    check: Callable[[], None] = lambda: None,
) -> list[Written]:
    """What the model writes after each prompt, all of them at once. `seeds`: one a prompt, where it samples.

    `check` is called before each token, and may raise. Sampling is from the TOP likeliest tokens, with random numbers
    that are the row's own.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens")
    if not prompts:
        return []
    drawn = [np.random.Generator(np.random.Philox(seed)).random(manner.most_tokens) for seed in seeds]
    if manner.temperature and len(drawn) != len(prompts):
        raise ValueError("a seed for each prompt is needed to sample")
    written: dict[int, Written] = {}
    with evaluating(model):
        shared = _Shared.of(model, prompts)
        for batch in shared.batches(prompts):
            rows = [_Row(list(prompts[index]), drawn[index] if manner.temperature else None) for index in batch]
            shared.write(rows, manner, check)
            written |= {index: row.written(manner) for index, row in zip(batch, rows, strict=True)}
    return [written[index] for index in range(len(prompts))]


class _Row:
    """One prompt, and what has been written after it so far."""

    def __init__(self, prompt: list[int], drawn: NDArray[np.float64] | None) -> None:
        self.prompt, self.drawn = prompt, drawn
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = []
        self.ended = False
        self.spoken_from: int | None = None  # where the words begin, once that is known

    def is_done(self, manner: Manner) -> bool:
        if self.ended or len(self.tokens) >= manner.most_tokens:
            return True
        return self.spoken_from is not None and len(self.tokens) - self.spoken_from >= manner.max_new_tokens

    def take(self, ids: NDArray[np.int32], logprobs: NDArray[np.float32], manner: Manner) -> int:
        """The next token, of the likeliest [K] and their log-probabilities, which are kept."""
        at = 0
        if self.drawn is not None:
            shares = np.exp((logprobs.astype(np.float64) - float(logprobs[0])) / manner.temperature).cumsum()
            at = int(np.searchsorted(shares, self.drawn[len(self.tokens)] * shares[-1], side="right"))
            at = min(at, len(ids) - 1)
        token = int(ids[at])
        self.tops.append((ids, logprobs))
        self.ended = token in manner.ends
        if not self.ended:
            self.tokens.append(token)
            self.logprobs.append(float(logprobs[at]))
            if self.spoken_from is None:
                self.spoken_from = manner.spoken_from(self.tokens, False)
        return token

    def written(self, manner: Manner) -> Written:
        """What was said; of thoughts that never ended, nothing."""
        start = manner.spoken_from(self.tokens, True) if self.spoken_from is None else self.spoken_from
        ended = self.ended and start is not None
        start = len(self.tokens) if start is None else start
        tops = self.tops[start:]
        top_ids = np.full((len(tops), TOP), -1, dtype=np.int32)
        top_logprobs = np.full((len(tops), TOP), -np.inf, dtype=np.float16)
        for place, (ids, logprobs) in enumerate(tops):
            top_ids[place, : len(ids)] = ids
            top_logprobs[place, : len(ids)] = logprobs.astype(np.float16)
        said, logprobs_T = tuple(self.tokens[start:]), tuple(self.logprobs[start:])
        return Written(said, ended, logprobs_T, top_ids, top_logprobs, start)


class _Shared:
    """The beginning that prompts share: `length` tokens, their keys and values in `cache` (None: nothing is shared)."""

    def __init__(self, model: Any, length: int = 0, cache: Any = None) -> None:
        self.model, self.length, self.cache = model, length, cache
        self.device = device_of(model)
        self.cache_name = name_of_cache(model)
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}

    @classmethod
    def of(cls, model: Any, prompts: Sequence[Sequence[int]]) -> _Shared:
        """What `prompts` share, computed; nothing for one prompt, a short beginning, a family of another memory."""
        nothing = cls(model)
        length = min(_common(prompts), min(map(len, prompts)) - 1)
        if len(prompts) < 2 or length < SHARED_AT_LEAST or nothing.cache_name == "state":
            return nothing
        ids = torch.tensor([list(prompts[0][:length])], device=nothing.device)
        output = model(input_ids=ids, use_cache=True, **nothing.last_only)
        cache = output.get(nothing.cache_name)
        return cls(model, length, cache) if keeps_keys_alone(cache) else nothing

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Which prompts go together: all, but where padding would be read.

        A recurrent state reads it. A sliding window counts it, between the shared beginning and the rest of a prompt:
        there, prompts of one length go together.
        """
        places = list(range(len(prompts)))
        if self.cache_name == "state":
            return [[place] for place in places]
        if self.cache is not None and any(getattr(self.cache, "is_sliding", ())):
            by_length = sorted(places, key=lambda place: (len(prompts[place]), place))
            return [list(group) for _, group in groupby(by_length, lambda place: len(prompts[place]))]
        return [places]

    def write(self, rows: Sequence[_Row], manner: Manner, check: Callable[[], None]) -> None:
        """One batch. B rows, S the longest rest of a prompt; the mask covers the shared beginning and grows."""
        rests = [row.prompt[self.length :] for row in rows]
        longest = max(map(len, rests))
        padded = [[manner.pad_id] * (longest - len(ids)) + ids for ids in rests]
        known = [[1] * self.length + [0] * (longest - len(ids)) + [1] * len(ids) for ids in rests]
        ids_BS, mask_BS = torch.tensor(padded, device=self.device), torch.tensor(known, device=self.device)
        positions_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)[:, self.length :]
        cache = self._repeated(len(rows))
        for _ in range(manner.most_tokens):
            check()
            output = self.model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=positions_BS,
                use_cache=True,
                **({} if cache is None else {self.cache_name: cache}),
                **self.last_only,
            )
            cache = output.get(self.cache_name)
            next_B = _next_tokens(output.logits[:, -1], rows, manner)
            if all(row.is_done(manner) for row in rows):
                return
            next_B1 = torch.tensor(next_B, device=self.device)[:, None]
            following_B1 = positions_BS[:, -1:] + 1
            whole = cache is None  # the family keeps nothing: the prompt is read again with each token
            ids_BS = torch.cat((ids_BS, next_B1), dim=1) if whole else next_B1
            positions_BS = torch.cat((positions_BS, following_B1), dim=1) if whole else following_B1
            mask_BS = torch.cat((mask_BS, mask_BS.new_ones(len(rows), 1)), dim=1)

    def _repeated(self, count: int) -> Any:
        if self.cache is None:
            return None
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        return cache


def _next_tokens(logits_BV: Tensor, rows: Sequence[_Row], manner: Manner) -> list[int]:
    """The next token of each row; of one that is done the pad."""
    logprobs_BV = logits_BV.float().log_softmax(dim=-1)
    top = logprobs_BV.topk(min(TOP, logprobs_BV.shape[1]), dim=-1)
    ids, logprobs = top.indices.to(torch.int32).cpu().numpy(), top.values.cpu().numpy()
    return [
        manner.pad_id if row.is_done(manner) else row.take(ids[place], logprobs[place], manner)
        for place, row in enumerate(rows)
    ]


def score(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    check: Callable[[], None] = lambda: None,
) -> list[tuple[float, ...]]:
    """Log-probabilities in nats of each answer's tokens behind its prompt, at temperature 1, all at once."""
    alone = name_of_cache(model) == "state"
    scored: list[tuple[float, ...]] = []
    with evaluating(model):
        for first in range(0, len(prompts), 1 if alone else max(1, len(prompts))):
            check()
            until = first + 1 if alone else len(prompts)
            scored += _scored(model, prompts[first:until], answers[first:until], pad_id)
    return scored


def _scored(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int
) -> list[tuple[float, ...]]:
    """B rows of S tokens, padded on the left; the last L of them hold every answer."""
    device = device_of(model)
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest, kept = max(map(len, rows)), max(map(len, answers)) + 1
    ids_BS = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    positions_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
    last = {"logits_to_keep": kept} if "logits_to_keep" in forward_parameters(model) else {}
    output = model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=False, **last)
    return [_of_row(output.logits[place, -kept:], ids_BS[place], len(answer)) for place, answer in enumerate(answers)]


def _of_row(logits_LV: Tensor, ids_S: Tensor, count: int) -> tuple[float, ...]:
    """Log-probabilities of a row's last `count` tokens. One row's alone are in fp32: a batch's would be gigabytes."""
    if not count:
        return ()
    logprobs_TV = logits_LV[-count - 1 : -1].float().log_softmax(dim=-1)
    return tuple(logprobs_TV.gather(1, ids_S[-count:, None])[:, 0].tolist())


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    return next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
