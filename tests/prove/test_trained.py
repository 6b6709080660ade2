"""The base, rows and recipe that proofs make: good as a user's are, and with steps enough."""

from __future__ import annotations

from pathlib import Path

from qlora import api
from qlora.prove import trained
from tests.prove.cases import place


def test_the_recipe_its_base_and_its_rows_are_good(tmp_path: Path) -> None:
    where = place(tmp_path, length=128)
    recipe = trained.recipe_of(trained.recipe_file(where, "straight"))
    found = api.check(recipe)
    assert recipe.output.dir == str(tmp_path / "runs") and recipe.train.max_steps == trained.STEPS
    assert max(found.data.train.lengths) <= 128 and found.data.eval.lengths
    assert trained.recipe_of(trained.recipe_file(where, "killed")).model_dump() == recipe.model_dump()
