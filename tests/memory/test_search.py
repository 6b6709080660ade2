"""The search: what is tried, in which order, how seldom the simulation is asked, and why a plan is what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qlora.memory.changes import changed, value_of
from qlora.memory.estimate import Estimate, Estimator
from qlora.memory.hardware import Machine
from qlora.memory.levers import Lever, Saving
from qlora.memory.plan import Planner
from qlora.memory.search import MOST_SIMULATIONS, Found, Search, _worth, reasons
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import Workload
from qlora.recipe.reading import Recipe, recipe_of_base
from tests.families import make_config
from tests.sampling import sampled

GIB = 1 << 30
MOVE, STORE = Lever("memory.offload_activations", False, True), Lever("memory.limit", "auto", "1GiB", whole=True)
AUTO = ("train.micro_batch_size=auto", "train.gradient_checkpointing=auto")


class ByHand:
    """Of ten layers and 10 GiB of weights: a kept layer takes 1 GiB a row, a recomputed one 0.1 GiB a row; recomputing
    all takes a third more time. MOVE takes the 0.1 away for nothing; STORE takes 8 GiB away at half the speed."""

    layers = 10

    def __init__(self, limit_gib: float, wrong_gib: float = 0) -> None:
        self.limit_bytes, self.asked, self.wrong = int(limit_gib * GIB), list[tuple[Any, ...]](), int(wrong_gib * GIB)

    def __call__(self, recipe: Recipe) -> Estimate:
        setting, rows = recipe.train.gradient_checkpointing, recipe.train.micro_batch_size
        assert setting != "auto" and rows != "auto"
        count = 10 if setting is True else int(setting)
        moved, stored = value_of(recipe, MOVE.key) is True, value_of(recipe, STORE.key) == STORE.on
        self.asked.append((rows, count, moved, stored))
        a_row = (10 - count) * GIB + (0 if moved else count * GIB // 10)
        needed = 10 * GIB + rows * a_row - (8 * GIB - self.wrong) * stored
        seconds = rows * (3 + count / 10) * (2 if stored else 1)
        known = {MOVE.key: Saving(rows * GIB, True), STORE.key: Saving(8 * GIB, False, (3.0, 3.0))}
        settings = {"train.micro_batch_size": rows, "train.gradient_checkpointing": setting, "data.max_length": 1}
        parts = {"weights": 10 * GIB, "context": 0}
        return Estimate(
            needed, 0, self.limit_bytes, 0, 0, parts, {}, {}, needed, 0, rows / seconds, settings, savings=known
        )


def search(by_hand: ByHand, *settings: str, levers: Sequence[Lever] = (MOVE, STORE), rows: int = 4) -> Search:
    return Search(by_hand, recipe_of_base("owner/name", settings or AUTO), ByHand.layers, tuple(levers), rows)


def taken(found: Found) -> tuple[Any, ...]:
    train = found.recipe.train
    on = [lever.key.partition(".")[2] for lever in (MOVE, STORE) if value_of(found.recipe, lever.key) == lever.on]
    return train.micro_batch_size, train.gradient_checkpointing, on


@pytest.mark.parametrize(
    ("limit_gib", "best"),
    [
        (60, (1, False, [])),  # as fast as four rows, which need more
        (17, (1, 3, ["offload_activations"])),  # of 10 + 10: three that are recomputed leave 7 GiB, and no inputs
        (10, (1, True, ["offload_activations"])),
        (9.5, (1, True, ["limit"])),  # half the speed, and nothing else fits
        (2.0, (1, True, ["offload_activations", "limit"])),
    ],
)
def test_the_fastest_that_fits(limit_gib: float, best: tuple[Any, ...]) -> None:
    by_hand = ByHand(limit_gib)
    (found,) = search(by_hand).fitting()
    assert taken(found)[1:] == best[1:] and found.estimate.fits
    every = [by_hand(changed(found.recipe, {"train.gradient_checkpointing": count})) for count in range(1, 10)]
    slower = [one for one in every if one.fits and one.tokens_per_second > found.estimate.tokens_per_second]
    assert not slower or value_of(found.recipe, STORE.key) == STORE.on


def test_where_nothing_fits_the_smallest_is_told() -> None:
    looked = search(ByHand(1.5))
    assert looked.fitting() == [] and taken(looked.smallest())[1:] == (True, ["offload_activations", "limit"])


def test_a_guess_that_was_wrong_is_not_taken() -> None:
    """STORE saves 3 GiB less than guessed: what was to fit does not, and the next is tried."""
    assert search(ByHand(4.0)).fitting() != []
    assert search(ByHand(4.0, wrong_gib=3)).fitting() == []


def test_what_fits_as_it_is_is_asked_once() -> None:
    by_hand = ByHand(60)
    (found,) = search(by_hand, "train.micro_batch_size=2").fitting()
    assert by_hand.asked == [(2, 0, False, False)] and taken(found) == (2, False, [])


@pytest.mark.parametrize("limit_gib", [60, 30, 17, 11, 10, 9.5, 4, 2.0, 1.5])
def test_no_search_simulates_more_than_nine_times(limit_gib: float) -> None:
    """A part of the layers is put together from none and all of them: it is not simulated."""
    by_hand = ByHand(limit_gib, wrong_gib=20 if limit_gib == 9.5 else 0.4)  # 20: nothing that was guessed to fit does
    search(by_hand, rows=16).fitting(3)
    parts = ((rows, *levers, part) for rows, count, *levers in by_hand.asked for part in _simulated(count))
    assert len(set(parts)) <= MOST_SIMULATIONS + 1  # the last one tried may ask for both


def _simulated(count: int) -> tuple[int, ...]:
    return (0, 10) if 0 < count < 10 else (count,)


def test_a_plan_that_a_faster_one_beats_in_memory_too_is_not_shown() -> None:
    """MOVE costs no time; STORE costs half of the speed and saves a lot. Nothing is known of speeds: all are shown."""
    for limit in (60, 17, 11, 10, 4):
        found = search(ByHand(limit)).fitting(3)
        pairs = [(1 / one.estimate.tokens_per_second, one.estimate.needed_bytes) for one in found]
        for slower, needed in pairs:
            assert all(other > needed for seconds, other in pairs if seconds < slower), limit
    found = search(ByHand(17)).fitting(3)
    unknown = [replace(one, estimate=replace(one.estimate, tokens_per_second=0.0)) for one in found]
    assert len(found) > 1 and _worth(unknown) == unknown
    slower = replace(found[0], estimate=replace(found[0].estimate, tokens_per_second=0.1))
    assert _worth([found[0], slower]) == [found[0]]


def test_each_choice_has_its_reason() -> None:
    looked = search(ByHand(9.5))
    (found,) = looked.fitting()
    said = reasons(looked, found)
    assert said[STORE.key] == "about 8.00 GiB wait on the host, without that 4.50 GiB would be missing"
    assert said[MOVE.key] == "it fits without"
    assert set(said) == {"train.gradient_checkpointing", "train.micro_batch_size", MOVE.key, STORE.key}
    looked = search(ByHand(17))
    (found,) = looked.fitting()
    assert "GiB would be missing" in reasons(looked, found)["train.gradient_checkpointing"]
    looked = search(ByHand(60), "train.micro_batch_size=2")
    (found,) = looked.fitting()
    assert reasons(looked, found)["train.gradient_checkpointing"] == "there is room to keep what every layer computes"


@pytest.mark.parametrize("share", sampled([0.2, 0.5, 0.9], 0.5))
def test_a_real_search_simulates_at_most_nine_times(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_config("llama", vocab=512, overrides={"num_hidden_layers": 8})
    recipe = recipe_of_base("some/base", ["data.max_length=8192", "eval.samples=0"])
    estimator = Estimator(text, "tiny", Machine("cuda", 1 << 40, "as given"))
    monkeypatch.setattr(estimator, "_shelf", None)
    none, every = (
        estimator.estimate(changed(recipe, {"train.gradient_checkpointing": on})).needed_bytes for on in (False, True)
    )
    limit = int(every + share * (none - every))
    tight = Estimator(text, "tiny", Machine("cuda", limit, "as given"))
    monkeypatch.setattr(tight, "_shelf", None)
    simulated: list[Workload] = []
    run = Simulator._simulated
    monkeypatch.setattr(Simulator, "_simulated", lambda self, load: simulated.append(load) or run(self, load))
    (best, *_) = Planner(tight).search(recipe)
    assert best.estimate.fits and 2 <= len(simulated) <= MOST_SIMULATIONS
    assert best.estimate.needed_bytes <= limit and best.reasons
