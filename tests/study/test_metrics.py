"""Scores against a plain recount written apart from them."""

from __future__ import annotations

import itertools
import math
import random
import re
import string
from fractions import Fraction

import numpy as np
import pytest

from qlora.study import metrics


def squad(text: str) -> list[str]:
    """SQuAD's normalisation, version 1.1, as its description has it."""
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def squad_f1(one: str, other: str) -> float:
    left, right = squad(one), squad(other)
    shared = 0
    for word in left:
        if word in right:
            right.remove(word)
            shared += 1
    if not shared:
        return float(not left and not squad(other))
    precision, recall = shared / len(squad(other)), shared / len(left)
    return 2 * precision * recall / (precision + recall)


def test_without_numbers_the_scores_are_those_of_squad() -> None:
    draw = random.Random(0)
    vocabulary = ["the", "a", "Pump", "valve,", "is", "red.", "an", "old", "button", "cold", "(new)", "pump"]
    for _ in range(300):
        one, other = (" ".join(draw.choices(vocabulary, k=draw.randint(1, 6))) for _ in range(2))
        if not squad(one) or not squad(other):  # the script makes nothing of an article, we keep it
            continue
        assert metrics.token_f1(one, other, "en") == pytest.approx(squad_f1(one, other))
        assert metrics.exact_match(one, other, "en") == (squad(one) == squad(other))
        runs = [squad(other)[i : i + len(squad(one))] for i in range(len(squad(other)))]
        assert metrics.contains(one, other, "en") == (squad(one) in runs)


@pytest.mark.parametrize(
    ("answer", "given", "language", "is_in"),
    [
        ("7 years", "The warranty is seven years.", "en", True),
        ("7", "It takes 17 minutes", "en", False),
        ("7 years", "7 or 8 years", "en", False),
        ("0.8 bar", "below 8 bar", "en", False),
        ("the OK button", "Press OK button twice", "en", True),
        ("49,90 €", "Es kostet 49,90 Euro.", "de", True),
        ("七年", "保修期为7年。", "zh", True),
        ("外壳", "不锈钢外壳", "zh", True),
        ("", "anything", "en", False),
        ("…", "anything", "en", False),
    ],
)
def test_contains_is_over_whole_tokens(answer: str, given: str, language: str, is_in: bool) -> None:
    assert metrics.contains(answer, given, language) is is_in


def test_the_best_of_several_answers_counts() -> None:
    assert metrics.best(metrics.contains, ["two years", "24 months"], "for 24 months", "en") == 1
    assert metrics.best(metrics.contains, [], "for 24 months", "en") == 0


def test_bootstrap_is_the_percentiles_of_means_drawn_again() -> None:
    scores = [1.0] * 7 + [0.0] * 13
    found = metrics.bootstrap(scores, seed=3)
    # All means that drawing again can give, by their exact binomial chances.
    chance = [math.comb(20, hits) * 0.35**hits * 0.65 ** (20 - hits) for hits in range(21)]
    cumulated = list(itertools.accumulate(chance))
    low, high = (next(hits for hits in range(21) if cumulated[hits] >= q) / 20 for q in (0.025, 0.975))
    assert (found.mean, found.low, found.high) == pytest.approx((0.35, low, high))
    assert metrics.bootstrap(scores, seed=3) == found
    assert metrics.bootstrap(np.linspace(0, 1, 50).tolist(), 1) != metrics.bootstrap(np.linspace(0, 1, 50).tolist(), 2)


def test_scores_that_are_all_equal_still_have_an_interval() -> None:
    nothing, everything = metrics.bootstrap([0.0] * 200, 0), metrics.bootstrap([1.0] * 200, 0)
    assert (nothing.low, everything.high) == (0, 1)
    # 1.8 %: with this share, none of 200 has a chance of 2.5 %.
    assert (1 - nothing.high) ** 200 == pytest.approx(0.025) and everything.low == pytest.approx(1 - nothing.high)
    assert metrics.bootstrap([], 0) == metrics.Interval(0.0, 0.0, 1.0)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (5, 5), (3, 10), (40, 20), (0, 12)])
def test_mcnemar_is_a_doubled_binomial_tail(one: int, other: int) -> None:
    first = [True] * one + [False] * other + [True] * 9
    second = [False] * one + [True] * other + [True] * 9
    count = one + other
    tail = sum(Fraction(math.comb(count, hits), 2**count) for hits in range(min(one, other) + 1))
    assert metrics.mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)))


def test_mcnemar_of_thousands_is_a_number() -> None:
    assert metrics.mcnemar([True] * 5000 + [False] * 4000, [False] * 5000 + [True] * 4000) < 1e-20
