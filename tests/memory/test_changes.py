"""Changes of a recipe by key, and the mildest of a sequence."""

from __future__ import annotations

from qlora.memory.changes import changed, differences, halved, mildest, toml_value, value_of
from qlora.recipe.reading import recipe_of_base


def test_a_change_is_what_differs() -> None:
    recipe = recipe_of_base("owner/name", [])
    changes = {"lora.r": 8, "data.max_length": 512}
    other = changed(recipe, changes)
    assert differences(recipe, other) == changes and recipe.lora.r == 16
    assert [value_of(other, key) for key in changes] == [8, 512] and toml_value(True) == "true"
    assert list(halved(16, 3)) == [8, 4]


def test_the_mildest_step_is_found_by_halving() -> None:
    asked: list[int] = []

    def fitting(step: int) -> str | None:
        asked.append(step)
        return f"at {step}" if step >= 11 else None

    assert mildest(range(16), fitting) == "at 11" and len(asked) <= 5
    assert mildest(range(11), fitting) is None and mildest([], fitting) is None
