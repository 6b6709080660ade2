"""The Python API: what a caller gets without a screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import api
from qlora.errors import RecipeError
from qlora.recipe.reading import load_recipe
from tests.runs import write_recipe


def test_check_reads_every_row_and_makes_no_run(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    checked = api.check(load_recipe(recipe))
    data = checked.data
    assert checked.memory is not None and checked.memory.fits
    assert len(data.train.lengths) + len(data.eval.lengths) == 30
    assert not (tmp_path / "runs").exists()


def test_a_recipe_a_folder_or_a_hub_name_is_asked_about(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    assert api.recipe_or_model(str(recipe), ["lora.r=5"]).lora.r == 5
    for what in (llama, llama / "config.json"):
        assert api.recipe_or_model(str(what)).model.base == str(llama)
    assert api.recipe_or_model("owner/name").model.base == "owner/name"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gpu": "RTX 4090", "vram": "8GiB"}, "both name the limit"), ({"stack": "other"}, "no stack 'other'")],
)
def test_questions_that_cannot_be_answered(settings: dict[str, str], message: str, llama: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        api.question(api.recipe_or_model(str(llama)), **settings)
