"""How many answers are drawn at once follows from the memory there is; what they are drawn to, from recipe and rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora.memory.asking import Asked
from qlora.memory.at_once import asking, drawing, draws_of
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.families import make_config

DRAWS = Asked(16, 0, 512, 64, drawn=1)


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    text = make_config("llama", vocab=4096)
    return Simulator(ModelSpec(text, "tiny", LoraSection(r=4), QuantizationSection(), target="cpu"), True)


def test_as_many_are_drawn_at_once_as_fit(simulator: Simulator) -> None:
    workload = Workload(1, 64, draws=DRAWS)
    peaks = {
        rows: simulator.run(replace(workload, draws=DRAWS._replace(rows=rows))).phases["draw"].total
        for rows in (16, 8, 4)
    }
    assert peaks[16] > peaks[8] > peaks[4]
    for rows, peak in peaks.items():
        fitting = drawing(workload, simulator, peak).draws
        assert fitting is not None and fitting.rows == rows
    least = drawing(workload, simulator, 0).draws
    assert least is not None and least.rows < 4  # the step itself takes more than that


def test_a_study_asks_as_many_as_fit(simulator: Simulator) -> None:
    workload = Workload(1, 64, asks=(("study", (Asked(16, 0, 256, 64),)),))
    whole = simulator.run(workload).phases["study"].total
    assert asking(workload, simulator, whole) == workload
    (batch,) = asking(workload, simulator, whole - 1).asks[0][1]
    assert batch.rows < 16


@pytest.mark.parametrize(
    ("train", "known", "expected"),
    [
        ({}, (None, None), (16, 1792, 256)),
        ({"max_completion_length": 2000}, (100, 8), (8, 100, 2000)),  # a short prompt beside it has as much room
        ({}, (2040, 64), (16, 2040, 256)),
        ({"max_completion_length": 5}, (30, None), (16, 30, 5)),
    ],
)
def test_a_prompt_and_its_answer_share_a_row(
    train: dict[str, Any], known: tuple[int | None, int | None], expected: tuple[int, int, int]
) -> None:
    data = {"train": [{"path": "rows.jsonl"}]}
    of_train = {"objective": "grpo", "rewards": ["exact_match"], **train}
    recipe = Recipe.model_validate({"model": {"base": "b"}, "data": data, "train": of_train})
    rows, own, new = expected
    assert draws_of(recipe, *known) == Asked(rows, 0, own, new, drawn=1)
    assert draws_of(Recipe.model_validate({"model": {"base": "b"}, "data": data}), None, None) is None
