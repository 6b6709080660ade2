"""Settings that fit: the fastest that do, and the cheapest changes where none do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from qlora import api
from qlora.errors import DoesNotFit
from qlora.memory import plan as memory_plan
from qlora.memory.changes import changed
from qlora.memory.estimate import DataFacts, Estimate
from qlora.memory.plan import Planner
from qlora.recipe.reading import Recipe
from tests.memory.by_hand import AUTO, ByHand, planner, recipe
from tests.memory.cases import GIB, NAMES
from tests.memory.shapes import config_folder


@pytest.mark.slow
def test_the_search_finds_the_fastest_that_fits_and_its_changes_fit(tmp_path: Path) -> None:
    recipe = api.recipe_or_model(
        str(config_folder(NAMES[8], tmp_path)), ["data.max_length=2048", "memory.stream_weights=false"]
    )
    question = api.question(recipe, vram="6.3GiB")
    assert not question.estimate().fits
    plans = question.search()
    assert plans and all(plan.estimate.fits for plan in plans)
    speeds = [plan.estimate.tokens_per_second for plan in plans]
    assert speeds == sorted(speeds, reverse=True) and "data.max_length" in plans[0].changes
    again = api.question(changed(recipe, plans[0].changes), vram="6.3GiB").estimate()
    assert again.fits and again.peak_bytes == plans[0].estimate.peak_bytes


@pytest.mark.slow
def test_room_is_used_for_speed(tmp_path: Path) -> None:
    recipe = api.recipe_or_model(str(config_folder("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path)))
    best = api.question(recipe, vram="24GiB").search()[0]
    assert best.changes["train.gradient_checkpointing"] is False and best.changes["train.micro_batch_size"] >= 4


@pytest.mark.slow
def test_each_remedy_is_cheapest_first_and_enough(tmp_path: Path) -> None:
    recipe = api.recipe_or_model(
        str(config_folder(NAMES[8], tmp_path)), ["train.micro_batch_size=8", "train.gradient_checkpointing=false"]
    )
    planner = Planner(api.question(recipe, vram="30GiB").estimator)
    remedies = planner.remedies(recipe)
    assert "train.micro_batch_size" in remedies[0].changes
    for remedy in remedies:
        assert planner.ask(changed(recipe, remedy.changes)).fits and remedy.saved_bytes > 0


@pytest.mark.slow
def test_a_base_that_is_too_large_is_said_to_be(tmp_path: Path) -> None:
    recipe = api.recipe_or_model(str(config_folder(NAMES[8], tmp_path)))
    error = api.question(recipe, vram="1GiB").does_not_fit()
    assert "nothing is enough with this base" in error.hint and "are the base's weights" in error.what


# --- where the search looks, on a card whose needs a hand can compute -------------------------------------------------


@pytest.mark.parametrize(
    ("limit_gib", "rows", "recomputes"),
    [(2.5, 1, True), (3.5, 1, True), (6.5, 4, True), (18.5, 16, True), (70.0, 16, False)],
)
def test_auto_is_the_fastest_that_fits(limit_gib: float, rows: int, recomputes: bool) -> None:
    plan = planner(limit_gib).decide(recipe(*AUTO))
    assert plan.changes == {"train.micro_batch_size": rows, "train.gradient_checkpointing": recomputes}
    assert plan.estimate.fits is (limit_gib >= 3)


@pytest.mark.parametrize(("limit_gib", "recomputes", "asked"), [(6.0, False, 1), (5.9, True, 2), (2.5, True, 2)])
def test_layers_are_recomputed_only_where_that_is_needed(
    limit_gib: float, recomputes: bool, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default, with the default's micro-batch: what fits without is not simulated with."""
    questions: list[Any] = []
    estimate = ByHand.estimate
    monkeypatch.setattr(ByHand, "estimate", lambda self, *about: questions.append(about) or estimate(self, *about))
    plan = planner(limit_gib).decide(recipe())
    assert plan.changes == {"train.gradient_checkpointing": recomputes} and len(questions) == asked


class ByLayers(ByHand):
    """Of eight layers, each that is kept takes its part of the 3 MiB a token that recomputing all of them saves."""

    def __init__(self, limit_gib: float) -> None:
        super().__init__(limit_gib)
        self.layers = 8
        self.asked: list[Any] = []

    def estimate(self, recipe: Recipe, facts: DataFacts | None = None) -> Estimate:
        setting = recipe.train.gradient_checkpointing
        self.asked.append(setting)
        count = 8 if setting in ("auto",) or setting is True else int(setting)
        estimate = super().estimate(changed(recipe, {"train.gradient_checkpointing": True}), facts)
        kept = (8 - count) * 3 * 128 * (1 << 20) * estimate.settings["train.micro_batch_size"]
        settings = {**estimate.settings, "train.gradient_checkpointing": setting}
        speed = estimate.settings["train.micro_batch_size"] * (1.5 - 0.5 * count / 8)
        return replace(estimate, peak_bytes=estimate.peak_bytes + kept, settings=settings, tokens_per_second=speed)


@pytest.mark.parametrize(
    ("limit_gib", "setting"), [(6.0, False), (5.9, 1), (4.6, 4), (4.5, 4), (4.4, 5), (3.1, True), (2.9, True)]
)
def test_no_more_layers_are_recomputed_than_needed(limit_gib: float, setting: bool | int) -> None:
    """A layer that is kept takes 0.375 GiB; what is asked is the estimator, by halving."""
    estimator = ByLayers(limit_gib)
    plan = Planner(estimator).decide(recipe())  # type: ignore[arg-type]
    chosen = plan.changes["train.gradient_checkpointing"]
    assert (chosen, type(chosen)) == (setting, type(setting))
    assert plan.estimate.fits is (limit_gib >= 3) and len(estimator.asked) <= 6
    assert plan.estimate.peak_bytes <= limit_gib * GIB or limit_gib < 3


def test_a_search_names_the_number_of_layers() -> None:
    found = Planner(ByLayers(5.0)).search(recipe())  # type: ignore[arg-type]
    assert [plan.changes for plan in found] == [{"train.micro_batch_size": 2, "train.gradient_checkpointing": 7}]


def test_a_micro_batch_is_no_larger_than_its_batch_and_a_row_no_longer_than_the_data() -> None:
    facts = DataFacts(longest=128, batch_size=3, prompt_tokens=8, has_eval=False)
    assert planner(70, facts).decide(recipe(*AUTO)).recipe.train.micro_batch_size == 2
    long, short = (planner(70, facts).ask(recipe(f"data.max_length={length}")) for length in (1024, 512))
    assert long.peak_bytes == short.peak_bytes


def test_a_search_shortens_rows_only_where_nothing_else_is_enough() -> None:
    many = recipe("train.micro_batch_size=16")
    found = planner(6.5).search(many)
    assert [plan.changes for plan in found] == [
        {"train.micro_batch_size": 4, "train.gradient_checkpointing": True},
        {"train.micro_batch_size": 2, "train.gradient_checkpointing": True},
    ], "one row that keeps everything is slower, and needs as much as four"
    shorter = planner(2.6).search(many)
    assert {plan.recipe.data.max_length for plan in shorter} == {512}
    assert planner(2.0).search(recipe()) == []


def test_a_search_asks_first_whether_rows_fit_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most do; each other length would be four questions more."""
    lengths: list[int] = []
    estimate = ByHand.estimate
    monkeypatch.setattr(
        ByHand, "estimate", lambda self, *about: lengths.append(about[0].data.max_length) or estimate(self, *about)
    )
    assert planner(6.5).search(recipe("train.micro_batch_size=16")) and set(lengths) == {1024}


def test_a_remedy_says_what_it_changes_and_saves() -> None:
    remedies = planner(6.5).remedies(recipe("train.micro_batch_size=16", "train.gradient_checkpointing=true"))
    assert str(remedies[0]) == "train.micro_batch_size = 4 (saves 12.00 GiB)"
    both = planner(2.3).remedies(recipe("train.micro_batch_size=2", "train.gradient_checkpointing=false"))
    (only,) = both
    assert only.changes["train.gradient_checkpointing"] is True and only.changes["data.max_length"] == 256
    assert " and train.gradient_checkpointing = true and " in str(only)


def test_a_run_keeps_a_reserve_for_what_it_decides_itself() -> None:
    """6.2 GiB hold 4 rows, and 95 % of it do not."""
    by_hand: Any = ByHand(6.2)
    plan = memory_plan.choose(by_hand, recipe(*AUTO), None)
    assert plan.recipe.train.micro_batch_size == 2 and plan.estimate.limit_bytes == int(int(6.2 * GIB) * 0.95)
    assert memory_plan.choose(by_hand, recipe("train.micro_batch_size=4"), None).estimate.fits
    smallest = memory_plan.choose(cast(Any, ByHand(3.05)), recipe(*AUTO), None)  # which leaves no reserve
    assert smallest.changes == {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
    with pytest.raises(DoesNotFit):
        memory_plan.choose(cast(Any, ByHand(2.5)), recipe(*AUTO), None)


def test_the_margin_counts_wherever_something_must_fit() -> None:
    """6 GiB are 4 rows, and with a margin of half a GiB they are not."""
    asked = recipe("train.micro_batch_size=auto", "train.gradient_checkpointing=true")
    for margin, rows in ((0, 4), (0.5, 2)):
        by_hand: Any = ByHand(6.2, margin)
        assert Planner(by_hand).decide(asked).recipe.train.micro_batch_size == rows
    error = memory_plan.does_not_fit(Planner(cast(Any, ByHand(6.2, 0.5))), recipe("train.micro_batch_size=4"))
    assert "needs 6.50 GiB of memory (a margin of 0.50 GiB included)" in error.what


@pytest.mark.parametrize("limit_gib", [6.0, 70.0])
def test_whoever_moves_inputs_to_the_host_has_layers_recomputed(limit_gib: float) -> None:
    """Where all would fit without, too: there would be nothing to move."""
    plan = planner(limit_gib).decide(recipe("memory.offload_activations=true"))
    assert plan.changes == {"train.gradient_checkpointing": True}


def test_inputs_here_and_inputs_on_the_host_are_two_questions() -> None:
    asked = planner(6.0)
    for setting in ("auto", "true", "false", "auto"):
        asked.ask(recipe(f"memory.offload_activations={setting}"))
    assert len(asked._known) == 3
