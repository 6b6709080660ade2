"""Revisions as commits: how a recipe names rows of the hub, and what a resumed run takes of the recipe it recorded."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import NamedTuple

from qlora.recipe.reading import Recipe
from qlora.recipe.sections import SourceSection

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ROWS = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<split>[\w.-]+))?")


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


def pinned(recipe: Recipe, recorded: Recipe) -> Recipe:
    """The recipe with the commits that a run recorded: a branch that has moved on changes nothing."""
    model, data = recipe.model, recipe.data
    if not _COMMIT.fullmatch(model.revision):
        model = model.model_copy(update={"revision": recorded.model.revision})
    sources = {}
    for side in ("train", "eval"):
        ours, theirs = getattr(data, side), getattr(recorded.data, side)
        sources[side] = tuple(_pinned_source(*pair) for pair in zip_longest(ours, theirs[: len(ours)]))
    return recipe.model_copy(update={"model": model, "data": data.model_copy(update=sources)})


def _pinned_source(ours: SourceSection, theirs: SourceSection | None) -> SourceSection:
    """`hub:NAME@main` becomes `hub:NAME@COMMIT:train` where the run recorded that name and split."""
    rows, recorded = parse_hub_rows(ours.path), parse_hub_rows(theirs.path if theirs else "")
    if theirs is None or rows is None or recorded is None or _COMMIT.fullmatch(rows.revision):
        return ours
    same = (rows.name, rows.split) == (recorded.name, recorded.split)
    return ours.model_copy(update={"path": theirs.path}) if same else ours
