"""How rows of the hub are named, and which revisions a resumed run takes of the recipe that it recorded."""

from __future__ import annotations

import pytest

from qlora.recipe.pins import parse_hub_rows, resumed
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import DataSection, ModelSection, SourceSection

COMMIT = "a" * 40


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("hub:rows", ("rows", "main", "train")),
        ("hub:owner/rows@v1.0", ("owner/rows", "v1.0", "train")),
        ("hub:owner/rows:test", ("owner/rows", "main", "test")),
        ("hub:owner/rows@refs/pr/1:test", ("owner/rows", "refs/pr/1", "test")),
        ("hub:a/b/c", None),
        ("hub:", None),
        ("rows.jsonl", None),
    ],
)
def test_names_of_rows(path: str, rows: tuple[str, str, str] | None) -> None:
    parsed = parse_hub_rows(path)
    assert parsed == rows
    assert parsed is None or parse_hub_rows(str(parsed)) == parsed


def recipe(revision: str, *paths: str) -> Recipe:
    sources = tuple(SourceSection(path=path) for path in paths)
    return Recipe(model=ModelSection(base="owner/base", revision=revision), data=DataSection(train=sources))


def test_sources_take_the_commit_that_stands_in_their_place() -> None:
    """A source more than was recorded, and one in another's place, stay as they are: then the recipes differ."""
    recorded = recipe(COMMIT, f"hub:owner/rows@{COMMIT}:train", "/rows.jsonl")
    ours = recipe("main", "hub:owner/rows", "hub:owner/rows", "hub:owner/rows")
    paths = [source.path for source in resumed(ours, recorded).data.train]
    assert paths == [f"hub:owner/rows@{COMMIT}:train", "hub:owner/rows", "hub:owner/rows"]
    assert resumed(ours, recorded).model.revision == COMMIT
    other = recipe("b" * 40, f"hub:owner/rows@{'b' * 40}")
    assert resumed(other, recorded) == other, "a commit that the recipe names itself is kept"
