"""Changes of a recipe by `table.key`, and the search for the mildest of a sequence of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from qlora.recipe.reading import Recipe

Step = TypeVar("Step")
Found = TypeVar("Found")
Changes = Mapping[str, Any]  # "table.key" to the value that a recipe is changed to


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with other values of some `table.key`s."""
    for name, value in changes.items():
        table, key = name.split(".")
        section = getattr(recipe, table)
        recipe = recipe.model_copy(update={table: section.model_copy(update={key: value})})
    return recipe


def value_of(recipe: Recipe, name: str) -> Any:
    """Of a `table.key`."""
    table, key = name.split(".")
    return getattr(getattr(recipe, table), key)


def differences(before: Recipe, after: Recipe) -> dict[str, Any]:
    """`table.key` to the new value, for every key that differs."""
    old, new = before.model_dump(), after.model_dump()
    return {
        f"{table}.{key}": new[table][key] for table in old for key in old[table] if old[table][key] != new[table][key]
    }


def toml_value(value: Any) -> str:
    """A value as a recipe writes it: what plans change looks the same in TOML and in JSON."""
    return json.dumps(value)


def halved(value: int, smallest: int) -> Iterator[int]:
    """Half of it, half of that, and so on, as long as it is not below `smallest`."""
    while value // 2 >= smallest:
        value //= 2
        yield value


def mildest(steps: Sequence[Step], fitting: Callable[[Step], Found | None]) -> Found | None:
    """What `fitting` finds at the first of the steps at which it finds anything; None where it does at none.

    Each step goes further than the one before it: what fits at one fits at every later one, so that halving the
    sequence asks the simulation 5 times for 16 steps.
    """
    if not steps or not (found := fitting(steps[-1])):
        return None
    least, first = 0, len(steps) - 1
    while least < first:
        middle = (least + first) // 2
        if nearer := fitting(steps[middle]):
            found, first = nearer, middle
        else:
            least = middle + 1
    return found
