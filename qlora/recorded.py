"""The recipe that a run recorded, and what it means for the same run when it goes on, whichever version wrote it."""

from __future__ import annotations

import os
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from qlora import grpo_keys
from qlora.errors import RecipeError
from qlora.recipe.pins import COMMIT, folder_split, parse_hub_rows
from qlora.recipe.problems import LineIndex
from qlora.recipe.reading import FREE_SECTIONS, TABLES, Recipe, cross_checks, read_table, recipe_of_table
from qlora.recipe.sections import SourceSection
from qlora.recipe_values import Section

_LENGTHS = {"epochs", "max_steps"}  # each is None where the other is given

AnySection = TypeVar("AnySection", bound=Section)


def load_recorded(path: Path) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that a run recorded, whichever version did, and the keys of it that this version does not know.

    Raises RecipeError for values that this version refuses.
    """
    text, raw = read_table(path)
    dropped = []
    try:
        Recipe.model_validate(raw)
    except ValidationError as error:
        for location in (item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"):
            place: Any = raw
            for step in location[:-1]:
                place = place[step]
            del place[location[-1]]
            dropped.append(".".join(map(str, location)))
    # TOML has no null: what may be None and is not there was None, whatever the default is now.
    for table, section in Recipe.model_fields.items():
        for key, field in getattr(section.annotation, "model_fields", {}).items():
            if type(None) in get_args(field.annotation) and isinstance(raw.get(table), dict):
                raw[table].setdefault(field.alias or key, None)
    return recipe_of_table(raw, path, text), tuple(dropped)


def differing_keys(ours: Recipe, theirs: Recipe) -> list[str]:
    """`table.key` of all that could change the result and is not the same in both.

    Where local files lie is left out: what they hold is compared when they are opened.
    """
    left, right = _without_places(ours), _without_places(theirs)
    return [
        f"{section}.{key}"
        for section in left
        if section not in FREE_SECTIONS
        for key in left[section]
        if left[section][key] != right[section][key]
    ]


def _without_places(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    if values["model"]["chat_template"] not in ("auto", "chatml"):
        values["model"]["chat_template"] = "local"  # the run has its text
    if os.path.isabs(values["lora"]["from"] or ""):
        values["lora"]["from"] = "local"  # `starting_adapter` compares what it holds
    values["train"]["rewards"] = grpo_keys.without_places(values["train"]["rewards"])
    tables = (values[table][key] for table, _, key in (name.partition(".") for name in TABLES))
    for place in (values["model"], *chain.from_iterable(tables)):
        name = "base" if "base" in place else "path"
        place[name] = "local" if os.path.isabs(place[name]) else place[name]
    return values


def whole_folders(recorded: Recipe) -> Recipe:
    """A recorded recipe whose folders of rows mean what they meant: without a split, all of it."""

    def placed(source: SourceSection) -> SourceSection:
        bare = not folder_split(source.path)[1] and os.path.isdir(source.path)
        return source.model_copy(update={"path": f"{source.path}:all"}) if bare else source

    data = recorded.data
    sides = {"train": tuple(map(placed, data.train)), "eval": tuple(map(placed, data.eval))}
    return recorded.model_copy(update={"data": data.model_copy(update=sides)})


def resumed(recipe: Recipe, recorded: Recipe) -> Recipe:
    """The recipe of a run that goes on: what `recipe` sets, and what the run recorded for every other key.

    A default that has changed since then changes nothing, nor does a branch that has moved on: the recorded commits
    stay. Only where runs stand (`output`) is as it is now. Raises RecipeError for keys that do not go together.
    """
    tables = [table for table in type(recipe).model_fields if table != "output"]
    filled = {table: _filled(getattr(recipe, table), getattr(recorded, table)) for table in tables}
    if not COMMIT.fullmatch(recipe.model.revision):
        filled["model"] = filled["model"].model_copy(update={"revision": recorded.model.revision})
    sources = {}
    for side in ("train", "eval"):
        ours, theirs = getattr(filled["data"], side), getattr(recorded.data, side)
        sources[side] = tuple(_pinned_source(*pair) for pair in zip_longest(ours, theirs[: len(ours)]))
    filled["data"] = filled["data"].model_copy(update=sources)
    merged = recipe.model_copy(update=filled)
    if problems := cross_checks(merged, LineIndex(Path("recipe"), "")):
        raise RecipeError(problems)
    return merged


def _filled(ours: AnySection, theirs: AnySection) -> AnySection:
    """`ours` with the values of `theirs` for the keys that nobody set in it."""
    given = ours.model_fields_set
    unset = type(ours).model_fields.keys() - given - (_LENGTHS if given & _LENGTHS else set())
    return ours.model_copy(update={key: getattr(theirs, key) for key in unset})


def _pinned_source(ours: SourceSection, theirs: SourceSection | None) -> SourceSection:
    """The source with what the run recorded in its place: keys that nobody set, the commit and split of that name."""
    if theirs is None:
        return ours
    ours = _filled(ours, theirs)
    rows, recorded = parse_hub_rows(ours.path), parse_hub_rows(theirs.path)
    if rows is None and recorded is None and not folder_split(ours.path)[1]:
        split = folder_split(theirs.path)[1]
        return ours.model_copy(update={"path": f"{ours.path}:{split}"}) if split else ours
    if rows is None or recorded is None or COMMIT.fullmatch(rows.revision):
        return ours
    same = rows.name == recorded.name and rows.split in ("", recorded.split)
    return ours.model_copy(update={"path": theirs.path}) if same else ours
