"""Means a token with intervals, and paired differences: against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest

from qlora.study.ratios import difference, ratio


def test_the_mean_is_a_token_and_not_a_row() -> None:
    assert ratio([10.0, 0.0], [10.0, 1.0], seed=0).mean == pytest.approx(10 / 11)
    with pytest.raises(ValueError):
        ratio([], [], seed=0)
    with pytest.raises(ValueError):
        ratio([1.0], [0.0], seed=0)


def test_the_interval_holds_the_mean_about_95_times_of_100() -> None:
    generator, held = np.random.default_rng(7), 0
    for seed in range(60):
        counts = generator.integers(5, 50, 60)
        means = generator.normal(2.0, 0.5, 60)
        found = ratio(list(means * counts), list(counts), seed)
        held += found.low <= 2.0 <= found.high
    assert 50 <= held <= 60


def test_a_pair_is_told_apart_where_two_intervals_overlap() -> None:
    generator = np.random.default_rng(3)
    counts = generator.integers(5, 50, 80)
    rows = generator.normal(2.0, 0.5, 80)
    one, other = rows * counts, (rows - 0.02 + generator.normal(0, 0.02, 80)) * counts
    apart = difference(list(one), list(other), list(counts), seed=0)
    assert 0 < apart.low < 0.02 < apart.high
    assert ratio(list(one), list(counts), 0).low < ratio(list(other), list(counts), 0).high
    assert difference(list(one), list(one), list(counts), 0) == difference(list(other), list(other), list(counts), 1)
