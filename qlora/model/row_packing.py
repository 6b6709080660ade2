"""Whether the rows of a run share packs: what the recipe asks for, and what the base's architecture allows.

Settled before rows are packed, memory is planned or the recipe is recorded, so that all of them, and a later export,
know of one answer. A run that goes on keeps the answer that it recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora.errors import Problem, RecipeError
from qlora.events import Notice, Sink
from qlora.model.family_facts import facts_of, trainable_facts
from qlora.model.meta_model import text_config
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import DataSection

KEY = "data.packing"


def settled(recipe: Recipe, config: Mapping[str, Any], sink: Sink) -> Recipe:
    """The recipe with packing off where documents of one pack would see each other, which a notice says.

    `config` is the base's config.json. Raises RecipeError where the recipe itself asks for packs, ModelError for a
    model whose loss cannot be computed here.
    """
    name = recipe.model.base
    text, _ = text_config(config, name)
    reason = trainable_facts(text, name).packing
    if not recipe.data.packing or not reason:
        return recipe
    if "packing" in recipe.data.model_fields_set:
        what = f"{name}: its rows must not share a pack: {reason}"
        raise RecipeError([Problem(KEY, what, "say packing = false, or leave the line out")])
    sink.emit(Notice("packing", f"off, each row is computed by itself: {reason}"))
    return recipe.model_copy(update={"data": without_packs(recipe.data)})


def as_measured(section: DataSection, config: Mapping[str, Any], name: str) -> DataSection:
    """The section by which the rows of a run that is over are measured: no packs where an older version made some."""
    if not section.packing:
        return section
    text, _ = text_config(config, name)
    return without_packs(section) if facts_of(text, name).packing else section


def without_packs(section: DataSection) -> DataSection:
    return section.model_copy(update={"packing": False})
