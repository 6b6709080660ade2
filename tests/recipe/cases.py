"""Recipes as texts, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.recipe.reading import load_recipe

ROOT = Path(__file__).parent.parent.parent
SMALL = '[model]\nbase = "owner/name"\n[[data.train]]\npath = "rows.jsonl"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return [(p.where.removeprefix(f"{folder}/"), p.what, p.hint) for p in caught.value.problems]
