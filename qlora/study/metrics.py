"""How answers are scored, without a judge.

The comparison follows SQuAD's evaluation script, version 1.1 (Rajpurkar et al. 2016, evaluate-v1.1.py: lower case,
punctuation and articles away, then exact match and F1 over tokens, the best of several answers), with three differences
that are told in `words.py`: numbers and units are exact (the script makes 35 of 3.5), articles are those of the
language, and Chinese is compared by characters. "Contains" is over whole tokens: 7 does not stand in 17.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qlora.study import words

# Efron and Tibshirani 1993, section 13: at least 1,000 for the ends of a percentile interval.
RESAMPLES = 10_000
CONFIDENCE = 0.95
_AT_ONCE = 4_000_000  # drawn numbers held at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean over questions with its 95 % interval; all are shares of 0 to 1."""

    mean: float
    low: float
    high: float


def contains(answer: str, given: str, language: str) -> bool:
    """Whether the tokens of `answer` stand in those of `given`, in a row. Never for an answer without a token."""
    wanted, found = words.normalized(answer, language), words.normalized(given, language)
    return bool(wanted) and any(
        found[at : at + len(wanted)] == wanted for at in range(len(found) - len(wanted) + 1) if found[at] == wanted[0]
    )


def exact_match(answer: str, given: str, language: str) -> bool:
    """Whether both are the same tokens."""
    return words.normalized(answer, language) == words.normalized(given, language)


def token_f1(answer: str, given: str, language: str) -> float:
    """Harmonic mean of the shares of shared tokens, counted as often as they stand; 1 for two without tokens."""
    wanted, found = words.normalized(answer, language), words.normalized(given, language)
    if not wanted or not found:
        return float(wanted == found)
    shared = (Counter(wanted) & Counter(found)).total()
    return 2 * shared / (len(wanted) + len(found))


def best(score: Callable[[str, str, str], float], answers: Sequence[str], given: str, language: str) -> float:
    """The best score among several accepted answers; 0 of none."""
    return max((float(score(answer, given, language)) for answer in answers), default=0.0)


def bootstrap(scores: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Interval:
    """Mean and percentile interval over questions drawn again with replacement (Efron 1979).

    Where all scores are equal, resampling can show no spread; the ends are then Clopper and Pearson's for the count of
    hits, scaled: 0 of 200 is 0 to 1.8 %. An interval of no scores is 0 to 1.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        return Interval(0.0, 0.0, 1.0)
    mean = float(values.mean())
    if np.ptp(values) == 0:
        slack = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(values))
        return Interval(mean, mean * (1 - slack), mean + (1 - mean) * slack)
    generator, means = np.random.default_rng(seed), []
    block = max(1, _AT_ONCE // len(values))
    for start in range(0, resamples, block):
        chosen = generator.integers(0, len(values), (min(block, resamples - start), len(values)))
        means.append(values[chosen].mean(axis=1))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(mean, float(low), float(high))


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Two-sided exact p-value of McNemar's test for two systems on the same questions.

    Under the null each question that only one gets right is either's with 1/2: a binomial tail, doubled (McNemar 1947;
    exact form in Fagerland et al. 2013). 1 where they never differ.
    """
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    count, fewer = only_one + only_other, min(only_one, only_other)
    tail, term = 0, 1
    for hits in range(fewer + 1):
        tail += term
        term = term * (count - hits) // (hits + 1)
    # Whole numbers up to here: 2 ** count is beyond a float from 1,024 on.
    return min(1.0, math.exp(math.log(2 * tail) - count * math.log(2)))
