"""The base of an export: the better loss where rows tell it from chance, else the nearer model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora.data.chat import TokenRow
from qlora.data.token_cache import PreparedSplit
from qlora.export.verify.choice import LEAST_ROWS, RESAMPLES, Choice, MeasuredBase, choose, paired_interval
from qlora.export.verify.fidelity import EVALUATION_ROWS, PROBE_ROWS, Positions, choose_positions


def positions_of(rows: int, source: str = EVALUATION_ROWS) -> Positions:
    """Rows of 3 to 7 tokens, all but the first of each trained, several in a pack."""
    ids = [[5 + row % 90, *range(4, 6 + row % 5)] for row in range(rows)]
    split = PreparedSplit(
        rows=[TokenRow(row, [0.0] + [1.0] * (len(row) - 1)) for row in ids],
        lengths=[len(row) for row in ids],
        trained=[len(row) - 1 for row in ids],
        wheres=["x"] * rows,
        sources=[0] * rows,
    )
    return choose_positions(split, (32, True), 0, 100, source)


def measured(positions: Positions, better: float, noise: float = 0.05) -> dict[str, MeasuredBase]:
    """NF4 near, the original weights far; their losses differ by `better` and by noise that is a row's own."""
    random = np.random.RandomState(1)
    losses, differences = [], []
    for _, places in positions.documents():
        losses += [2 + random.standard_normal()] * len(places)
        differences += [better + noise * random.standard_normal()] * len(places)
    of_nf4 = torch.tensor(losses)
    return {
        "nf4": MeasuredBase(1.7e-3, of_nf4),
        "full": MeasuredBase(0.16, of_nf4 - torch.tensor(differences)),
    }


def taken(rows: int, better: float, asked: str | None = None, max_kl: float | None = None, **more: object) -> Choice:
    positions = positions_of(rows, **more)  # type: ignore[arg-type]
    return choose(measured(positions, better), positions, asked, max_kl)  # type: ignore[arg-type]


def test_the_better_loss_is_taken_where_rows_tell_it() -> None:
    found = taken(60, 0.08)
    assert (found.merge_base, found.by, found.seen) == ("full", "loss", True)
    assert found.interval is not None and found.interval[0] < found.difference < found.interval[1] < 0
    assert found.kl == {"nf4": 1.7e-3, "full": 0.16} and found.rows == 60 and found.resamples == RESAMPLES
    assert "has seen these rows" in found.in_words() and "KL 0.16" in found.in_words()
    worse = taken(60, -0.08)
    assert (worse.merge_base, worse.by) == ("nf4", "loss") and worse.interval is not None and worse.interval[0] > 0


def test_what_may_be_chance_leaves_the_nearer_one() -> None:
    found = taken(60, 0.001)
    assert (found.merge_base, found.by, found.seen) == ("nf4", "kl", False)
    assert found.interval is not None and found.interval[0] < 0 < found.interval[1]


def test_few_rows_and_texts_of_ours_tell_nothing() -> None:
    for found in (taken(LEAST_ROWS - 1, 0.5), taken(60, 0.5, source=PROBE_ROWS)):
        assert (found.merge_base, found.by, found.interval) == ("nf4", "kl", None)
        assert "too few" in found.in_words()
    assert taken(LEAST_ROWS, 0.5).by == "loss"


def test_who_asks_gets_it_and_a_limit_on_kl_holds() -> None:
    found = taken(60, 0.08, asked="nf4")
    assert (found.merge_base, found.by, found.seen) == ("nf4", "asked", False) and found.interval is not None
    assert taken(60, 0.08, max_kl=0.01).merge_base == "nf4"
    assert taken(60, 0.08, max_kl=0.2).merge_base == "full"


def test_the_same_rows_give_the_same_interval_and_others_another() -> None:
    assert taken(40, 0.02).interval == taken(40, 0.02).interval
    assert taken(40, 0.02).interval != taken(41, 0.02).interval


def test_the_interval_is_that_of_a_mean_of_rows() -> None:
    """For many rows of one length: the mean and 1.96 standard errors, whatever the number of tokens in a row."""
    random = np.random.RandomState(3)
    of_rows = random.standard_normal(400) * 0.3 + 1
    for tokens in (1, 7):
        low, high = paired_interval(np.repeat(of_rows, tokens), [tokens] * 400, 5)
        error = 1.96 * of_rows.std() / 20
        assert low == pytest.approx(of_rows.mean() - error, abs=error / 20)
        assert high == pytest.approx(of_rows.mean() + error, abs=error / 20)


def test_rows_weigh_by_their_tokens() -> None:
    """A long row whose tokens differ outweighs many short ones that do not: its tokens count each."""
    difference = np.array([1.0] * 90 + [0.0] * 10)
    low, high = paired_interval(difference, [90, *[1] * 10], 5)
    assert low < 0.9 < high <= 1.0 and high > 0.95
