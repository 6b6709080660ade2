"""Recipes as texts, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import RecipeError
from qlora.recipe.reading import Recipe, load_recipe
from qlora.recipe_values import Section

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


@contextmanager
def other_defaults(defaults: Mapping[str, Any]) -> Iterator[None]:
    """As in another version: some `table.key`s have another default, in recipes that lack the whole table too."""
    before = {name: _default(name, value) for name, value in defaults.items()}
    try:
        yield
    finally:
        for name, (value, factory) in before.items():
            _default(name, value, factory)


def _default(name: str, value: Any, factory: Any = None) -> tuple[Any, Any]:
    """Give a key this default, or what makes one; returns what it had."""
    table, key = name.split(".")
    field = Recipe.model_fields[table]
    section = field.annotation
    assert isinstance(section, type) and issubclass(section, Section)
    declared = section.model_fields[key]
    before = declared.default, declared.default_factory
    declared.default, declared.default_factory = value, factory
    section.model_rebuild(force=True)
    if not field.is_required():
        field.default = section()
    Recipe.model_rebuild(force=True)
    return before
