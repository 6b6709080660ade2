"""Means a token over rows of different lengths, with their intervals: loss and token accuracy, and how two differ.

A mean a token is a ratio: what the rows add up to, over their tokens. Rows are drawn again, not tokens, since those of
an answer depend on each other (Efron and Tibshirani 1993, chapter 13); of two models on the same rows the difference is
drawn, since most of what differs is between the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora.study.metrics import CONFIDENCE, RESAMPLES, Interval

_AT_ONCE = 4_000_000  # drawn numbers held at a time: 32 MB


def ratio(sums: Sequence[float], counts: Sequence[float], seed: int) -> Interval:
    """The sum over the counts, with its percentile interval. One row alone shows no spread: its interval is a point.

    Raises ValueError where nothing was counted.
    """
    sums_R, counts_R = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if not counts_R.sum() > 0:
        raise ValueError("nothing was counted")
    generator, means = np.random.default_rng(seed), []
    block = max(1, _AT_ONCE // len(sums_R))
    for start in range(0, RESAMPLES, block):
        drawn = generator.integers(0, len(sums_R), (min(block, RESAMPLES - start), len(sums_R)))
        means.append(sums_R[drawn].sum(axis=1) / np.maximum(counts_R[drawn].sum(axis=1), 1e-12))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(sums_R.sum() / counts_R.sum()), float(low), float(high))


def difference(one: Sequence[float], other: Sequence[float], counts: Sequence[float], seed: int) -> Interval:
    """By how much `one` is above `other` a token, on the same rows."""
    return ratio([a - b for a, b in zip(one, other, strict=True)], counts, seed)
