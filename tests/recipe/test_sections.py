"""The keys of a recipe: defaults, descriptions, and the schema and recipes that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.recipe.reading import TABLES, Recipe, key_names, load_recipe, recipe_schema
from tests.recipe.cases import ROOT, SMALL, write


def test_smallest_recipe_has_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert recipe.train.epochs == 3.0 and recipe.train.max_steps is None
    assert recipe.quantization.type == "nf4" and recipe.lora.r == 16
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.model.base == "owner/name"


def test_shipped_schema_is_the_current_one() -> None:
    """After a change of a key: qlora-train --schema > recipes/recipe.schema.json"""
    assert json.loads((ROOT / "recipes/recipe.schema.json").read_text()) == recipe_schema()


def test_every_key_is_described() -> None:
    schema = recipe_schema()
    for name in (*key_names(), *TABLES):
        table, _, key = name.rpartition(".")
        section = TABLES[table].__name__ if table in TABLES else f"{table.capitalize()}Section"
        assert schema["$defs"][section]["properties"][key]["description"], name


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert path.read_text().startswith("#:schema ./recipe.schema.json\n")
    recipe = load_recipe(path)
    assert recipe.data.train or recipe.data.documents


def test_every_key_is_in_the_readme() -> None:
    readme = (ROOT / "recipes" / "README.md").read_text()
    for name in key_names():
        table, _, key = name.rpartition(".")
        assert f"`{key}`" in readme, f"{table}.{key}"


def test_a_recipe_object_can_be_made_in_python() -> None:
    recipe = Recipe.model_validate({"model": {"base": "owner/name"}, "data": {"train": [{"path": "x.jsonl"}]}})
    assert recipe.data.train[0].format == "auto"
