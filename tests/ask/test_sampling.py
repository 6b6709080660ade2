"""Tokens are drawn as transformers' own processors would leave them, and the same seed draws them again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qlora.ask.sampling import Drawer
from qlora.ask.settings import Sampling
from qlora.errors import ModelError

LOGITS = np.random.default_rng(3).normal(0, 3, 3000).astype(np.float32)
PLAIN = Sampling(temperature=1.0, top_p=1.0, seed=1)


def drawn(sampling: Sampling, count: int = 200, seen: tuple[int, ...] = ()) -> set[int]:
    drawer = Drawer(sampling)
    return {drawer.next(LOGITS, seen) for _ in range(count)}


def allowed(sampling: Sampling, seen: tuple[int, ...] = ()) -> tuple[set[int], torch.Tensor]:
    """Tokens and probabilities that transformers leaves, by its own processors in the order of its `generate`."""
    from transformers import generation as g

    steps = [
        g.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty) if seen else None,
        g.TemperatureLogitsWarper(sampling.temperature),
        g.TopKLogitsWarper(sampling.top_k) if sampling.top_k else None,
        g.TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None,
        g.MinPLogitsWarper(sampling.min_p) if sampling.min_p else None,
    ]
    scores = torch.from_numpy(LOGITS.copy())[None]
    for step in filter(None, steps):
        scores = step(torch.tensor([list(seen)]), scores)
    shares = scores[0].softmax(-1)
    return set(torch.nonzero(shares > 0).flatten().tolist()), shares


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_p": 0.3},
        {"min_p": 0.2},
        {"top_k": 1500, "top_p": 0.9},
        {"top_p": 0.999},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_the_same_tokens_are_left_as_in_transformers(settings: dict[str, float]) -> None:
    sampling = replace(PLAIN, **settings)  # type: ignore[arg-type]
    left, shares = allowed(sampling)
    found = drawn(sampling)
    assert found <= left
    likely = {token for token in left if shares[token] > 0.05}
    assert likely <= found


def test_frequencies_are_the_probabilities() -> None:
    sampling = replace(PLAIN, top_k=8)
    _, shares = allowed(sampling)
    drawer = Drawer(sampling)
    counts = np.bincount([drawer.next(LOGITS, ()) for _ in range(1500)], minlength=len(LOGITS)) / 1500
    assert np.abs(counts - shares.numpy()).max() < 0.05


def test_a_penalty_reaches_what_was_seen_and_nothing_else() -> None:
    best = int(LOGITS.argmax())
    greedy = Sampling(temperature=0, repetition_penalty=5.0)
    assert Drawer(greedy).next(LOGITS, ()) == best
    assert Drawer(greedy).next(LOGITS, (best, best, len(LOGITS) + 7)) == int(np.argsort(LOGITS)[-2])
    low = int(LOGITS.argmin())  # a negative logit becomes smaller, never larger
    assert Drawer(replace(greedy, repetition_penalty=1.5)).next(-LOGITS, (low,)) != Drawer(greedy).next(LOGITS, ())


def test_a_seed_draws_the_same_again_and_each_answer_of_its_own() -> None:
    def tokens(seed: int | None, number: int = 0) -> list[int]:
        drawer = Drawer(replace(PLAIN, seed=seed), number)
        return [drawer.next(LOGITS, ()) for _ in range(20)]

    assert tokens(7) == tokens(7) != tokens(8)
    assert tokens(7, 1) != tokens(7) and tokens(-1) == tokens(-1)
    assert tokens(None) != tokens(None)


def test_numbers_that_are_none_are_an_error() -> None:
    with pytest.raises(ModelError, match="not finite"):
        Drawer(PLAIN).next(np.array([0.0, np.nan], dtype=np.float32), ())
