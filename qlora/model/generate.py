"""Answers, several at a time: greedy ones for samples, exact match, chat and the verification of exports.

Prompts are padded on the left, so that every row's next token stands in the last column; each row has its own
positions, and is computed as it would be alone. The loop is ours because it must leave no trace: no configuration is
written, no random number drawn, and the model's training flags are given back as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora.model.weight_receiving import device_of
from qlora.step.forward import evaluating

ANSWERS_AT_ONCE = 16
# What layers keep that holds keys and values alone, a row's apart from another's.
_PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer"}
SAMPLE_TOKENS = 128  # the longest sample answer: what training asks for is what the estimator counts


# Of the logits [B, V] of a batch, and how many tokens its answers have: the next token of each row [B].
Choose = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Asked:
    """How prompts are answered: up to (and without) the first of `ends`, of so many at once.

    `pad_id` fills unused positions and may be any token: it is never attended to. `watch` is called before each token
    and at the end, with how many tokens are done and how many there can be (an answer that has ended counts as whole);
    it may raise.
    """

    ends: Collection[int]
    max_new_tokens: int
    pad_id: int
    batch_size: int = ANSWERS_AT_ONCE
    watch: Callable[[int, int], None] = lambda done, total: None


def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    end_token_ids: Collection[int],
    max_new_tokens: int,
    pad_id: int,
    batch_size: int = ANSWERS_AT_ONCE,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """The most likely continuation of each prompt, as `Asked` says."""
    asked = Asked(end_token_ids, max_new_tokens, pad_id, batch_size, watch)
    return answers_to(model, prompts, asked, lambda _: lambda logits_BV, _: logits_BV.argmax(dim=-1))


def answers_to(
    model: Any, prompts: Sequence[Sequence[int]], asked: Asked, choosing: Callable[[Sequence[int]], Choose]
) -> list[list[int]]:
    """An answer to each prompt, in the order of the prompts; `choosing` is told which of them are in a batch.

    Prompts of similar length share a batch.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens")
    alone = name_of_cache(model) == "state"  # padding would be read into it: RWKV takes no mask
    at_once, most = 1 if alone else asked.batch_size, asked.max_new_tokens
    answers: list[list[int]] = [[] for _ in prompts]
    total, before = len(prompts) * most, 0
    with evaluating(model):
        for chosen in asked_together(prompts, at_once):
            texts = [prompts[index] for index in chosen]
            watch = partial(lambda before, done: asked.watch(before + done, total), before)
            before += len(chosen) * most
            batch = _answer(model, texts, asked, watch, choosing(chosen))
            for index, answer in zip(chosen, batch, strict=True):
                answers[index] = answer
    asked.watch(total, total)
    return answers


def asked_together(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The numbers of the prompts that share a batch: those of similar length, the longest first."""
    by_length = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def _answer(
    model: Any, prompts: list[Sequence[int]], asked: Asked, watch: Callable[[int], None], choose: Choose
) -> list[list[int]]:
    """One batch. B prompts, S the longest of them; the mask grows by a column a token."""
    device, pad_id, ends = device_of(model), asked.pad_id, set(asked.ends)
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    position_ids_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
    forward = forward_parameters(model)
    # Where the model can, it is asked for the last position's logits: all of a long prompt's would be gigabytes.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
    cache_name = name_of_cache(model)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    cache = None
    for column in range(asked.max_new_tokens):
        watch(sum(column if goes_on else asked.max_new_tokens for goes_on in running))
        output = model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=position_ids_BS,
            use_cache=True,
            **{cache_name: cache},
            **last_only,
        )
        cache = output.get(cache_name)
        next_B = choose(output.logits[:, -1], column)
        for row, token in enumerate(next_B.tolist()):
            running[row] = running[row] and token not in ends
            if running[row]:
                answers[row].append(token)
        if not any(running):
            break
        ids_BS = next_B[:, None] if cache is not None else torch.cat((ids_BS, next_B[:, None]), dim=1)
        mask_BS = torch.cat((mask_BS, mask_BS.new_ones(len(prompts), 1)), dim=1)
        following_B1 = position_ids_BS[:, -1:] + 1
        position_ids_BS = following_B1 if cache is not None else torch.cat((position_ids_BS, following_B1), dim=1)
    return answers


def name_of_cache(model: Any) -> str:
    """What the model calls what it keeps between tokens: `cache` from transformers 5.24 on, RWKV `state`."""
    known = forward_parameters(model)
    return next((name for name in ("cache", "past_key_values", "state") if name in known), "cache")


def forward_parameters(model: Any) -> Collection[str]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inner.forward).parameters


def keeps_keys_alone(cache: Any) -> bool:
    """Whether a cache holds keys and values alone, so that one row's can be repeated for several."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer).__name__ in _PLAIN_LAYERS for layer in layers)
