"""The look at a recipe's data as Python calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.events import Recorder
from qlora.look import look_at_data
from tests.runs import write_recipe


def test_rows_are_looked_at_from_python(tmp_path: Path, llama: Path) -> None:
    sink = Recorder()
    seen = look_at_data(write_recipe(tmp_path, llama), rows=1, sink=sink)
    assert seen.documents is None and seen.rows is not None
    assert sink.of("notice"), "what preparation says reaches the caller's sink"


def test_a_recipe_without_rows_is_refused(tmp_path: Path, llama: Path) -> None:
    recipe = tmp_path / "bare.toml"
    recipe.write_text(f'[model]\nbase = "{llama}"\n')
    with pytest.raises(RecipeError, match="no training rows"):
        look_at_data(recipe)
