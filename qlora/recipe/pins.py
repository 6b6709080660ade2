"""How a recipe names rows of the hub, and what a resumed run takes of the recipe that it recorded."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

from qlora.errors import RecipeError
from qlora.recipe.problems import LineIndex
from qlora.recipe.reading import Recipe, cross_checks
from qlora.recipe.sections import Section, SourceSection

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ROWS = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<split>[\w.-]+))?")


_LENGTHS = {"epochs", "max_steps"}  # each is None where the other is given

AnySection = TypeVar("AnySection", bound=Section)


class HubRows(NamedTuple):
    """Rows of a data set of the hub; written `hub:NAME[@revision][:split]`."""

    name: str
    revision: str
    split: str

    def __str__(self) -> str:
        return f"hub:{self.name}@{self.revision}:{self.split}"


def parse_hub_rows(path: str) -> HubRows | None:
    """The rows that a source's path names (by default the split train of main); None for anything else."""
    match = _HUB_ROWS.fullmatch(path)
    return HubRows(match["name"], match["revision"] or "main", match["split"] or "train") if match else None


def resumed(recipe: Recipe, recorded: Recipe) -> Recipe:
    """The recipe of a run that goes on: what `recipe` sets, and what the run recorded for every other key.

    A default that has changed since then changes nothing, nor does a branch that has moved on: the recorded commits
    stay. Only where runs stand (`output`) is as it is now. Raises RecipeError for keys that do not go together.
    """
    tables = [table for table in type(recipe).model_fields if table != "output"]
    filled = {table: _filled(getattr(recipe, table), getattr(recorded, table)) for table in tables}
    if not _COMMIT.fullmatch(recipe.model.revision):
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
    """The source with what the run recorded in its place: keys that nobody set, and `hub:NAME@COMMIT` of that name."""
    if theirs is None:
        return ours
    ours = _filled(ours, theirs)
    rows, recorded = parse_hub_rows(ours.path), parse_hub_rows(theirs.path)
    if rows is None or recorded is None or _COMMIT.fullmatch(rows.revision):
        return ours
    same = (rows.name, rows.split) == (recorded.name, recorded.split)
    return ours.model_copy(update={"path": theirs.path}) if same else ours
