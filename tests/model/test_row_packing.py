"""Rows share packs only where the base keeps them apart: trained, estimated, exported and resumed with one answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora import api, run_folder
from qlora.errors import RecipeError
from qlora.events import Recorder
from qlora.model import row_packing
from qlora.recipe.reading import load_recipe, recipe_of_base
from qlora.recipe.sections import DataSection
from qlora.recorded import load_recorded
from tests import all_families
from tests.runs import run_dir, train, values, write_recipe

FEW = ("train.max_steps=2", "train.batch_size=2", "data.max_length=96", "eval.samples=0", "checkpoint.every_steps=1")
REASON = "Lfm2ShortConv convolves over tokens"


@pytest.fixture(scope="module")
def convolving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_families.make_base("lfm2", tmp_path_factory.mktemp("lfm2") / "base")


def said(recorder: Recorder) -> list[str]:
    notices = [event.as_dict() for event in recorder.of("notice")]
    return [notice["message"] for notice in notices if notice["topic"] == "packing"]


def test_a_run_on_an_unsafe_base_pads_its_rows_and_says_so(tmp_path: Path, convolving: Path) -> None:
    recipe = write_recipe(tmp_path, convolving)
    recorder = train(recipe, *FEW, "train.max_steps=1")
    assert said(recorder) == [f"off, each row is computed by itself: {REASON}"]
    assert values(recorder, "plan", "packing") == [False]
    recorded, _ = load_recorded(run_dir(recipe) / "recipe.toml")
    assert recorded.data.packing is False
    again = Recorder()  # as a run that goes on has its recipe, without training it a second time
    resumed = run_folder.resumed(run_dir(recipe), load_recipe(recipe, [*FEW, "train.max_steps=1"]), again)
    assert resumed.data.packing is False and said(again) == []


def test_packs_that_the_recipe_asks_for_are_refused_by_name(tmp_path: Path, convolving: Path) -> None:
    recipe = write_recipe(tmp_path, convolving)
    for ask in (api.check, api.train, api.estimate_memory):
        with pytest.raises(RecipeError) as refused:
            ask(load_recipe(recipe, [*FEW, "data.packing=true"]))  # type: ignore[operator]
        (problem,) = refused.value.problems
        assert problem.where == "data.packing"
        assert problem.what == f"{convolving}: its rows must not share a pack: {REASON}"
        assert problem.hint == "say packing = false, or leave the line out"


@pytest.mark.slow
def test_a_run_that_recorded_packs_goes_on_with_them(
    tmp_path: Path, convolving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older version recorded it, whose packs leaked less than it allowed."""
    recipe = write_recipe(tmp_path, convolving)
    with monkeypatch.context() as before:
        before.setattr(row_packing, "settled", lambda recipe, config, sink: recipe)
        before.setattr("qlora.training.selfcheck.TOLERANCE", 10.0)
        assert values(train(recipe, *FEW, stop_after=1), "plan", "packing") == [True]
    monkeypatch.setattr("qlora.training.selfcheck.TOLERANCE", 10.0)
    resumed = train(recipe, *FEW, mode="resume")
    assert values(resumed, "plan", "packing") == [True] and said(resumed) == []


def test_an_estimate_says_it_too(convolving: Path) -> None:
    recorder = Recorder()
    api.estimate_memory(recipe_of_base(str(convolving)), vram="8GiB", sink=recorder)
    assert said(recorder) == [f"off, each row is computed by itself: {REASON}"]


def test_an_older_runs_rows_are_measured_without_packs(convolving: Path, llama: Path) -> None:
    section = DataSection(packing=True)
    for base, packing in ((convolving, False), (llama, True)):
        config = json.loads((base / "config.json").read_text())
        assert row_packing.as_measured(section, config, "base").packing is packing
