"""How rows of the hub are named, and which revisions a resumed run takes of the recipe that it recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.recipe.pins import parse_hub_rows, resumed
from qlora.recipe.reading import Recipe, differing_keys, load_recipe, recipe_toml
from qlora.recipe.sections import DataSection, ModelSection, SourceSection
from tests.recipe.cases import SMALL, other_defaults, write

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


def run_of(folder: Path, text: str, *overrides: str) -> Recipe:
    """The recipe that a run of this one recorded."""
    file = folder / "recorded.toml"
    file.write_text(recipe_toml(load_recipe(write(folder, text), overrides)))
    return load_recipe(file)


NEW = {
    "train.learning_rate": 1e-5,
    "lora.r": 64,
    "data.eval_fraction": 0.3,
    "data.packing": False,
    "model.attention": "sdpa",
}


def test_a_key_that_the_recipe_does_not_set_is_the_runs(tmp_path: Path) -> None:
    recorded = run_of(tmp_path, SMALL + "[train]\nmax_steps = 7\n", "lora.r=4", "eval.samples=0")
    with other_defaults(NEW):
        ours = load_recipe(write(tmp_path, SMALL))
        assert ours.train.learning_rate == 1e-5 and ours.lora.r == 64
        merged = resumed(ours, recorded)
        assert merged == recorded and differing_keys(merged, recorded) == []


@pytest.mark.parametrize("name", [*NEW, "train.max_steps", "quantization.double_quant"])
def test_a_key_that_is_set_and_differs_is_found(tmp_path: Path, name: str) -> None:
    """Set in the file or by an override, also to what is the default now."""
    recorded = run_of(tmp_path, SMALL)
    values = {**NEW, "train.max_steps": 20, "quantization.double_quant": False}
    with other_defaults(NEW):
        value = str(values[name]).lower() if isinstance(values[name], bool) else values[name]
        found = differing_keys(resumed(load_recipe(write(tmp_path, SMALL), [f"{name}={value}"]), recorded), recorded)
        assert found == (["train.epochs", name] if name == "train.max_steps" else [name])


def test_each_source_takes_what_it_does_not_set(tmp_path: Path) -> None:
    two = SMALL + 'weight = 2.0\nformat = "text"\n[[data.train]]\npath = "b.jsonl"\n'
    recorded = run_of(tmp_path, two)
    ours = load_recipe(write(tmp_path, two.replace("weight = 2.0\n", "")))
    assert differing_keys(resumed(ours, recorded), recorded) == []
    for text in (two.replace("2.0", "3.0"), two + "weight = 0.5\n", SMALL, two.replace('"text"', '"alpaca"')):
        other = load_recipe(write(tmp_path, text))
        assert differing_keys(resumed(other, recorded), recorded) == ["data.train"], text


def test_where_runs_stand_is_as_it_is_now_and_what_is_free_stays(tmp_path: Path) -> None:
    recorded = run_of(tmp_path, SMALL, "output.dir=elsewhere", "checkpoint.keep=7", "memory.limit=6GiB")
    merged = resumed(load_recipe(write(tmp_path, SMALL), ["memory.limit=8GiB"]), recorded)
    assert (merged.output.dir, merged.checkpoint.keep, merged.memory.limit) == ("runs", 7, "8GiB")


def test_what_does_not_go_together_is_found_before_the_run_goes_on(tmp_path: Path) -> None:
    recorded = run_of(tmp_path, SMALL, "lora.use_dora=true")
    ours = load_recipe(write(tmp_path, SMALL), ["export.formats=['adapter-gguf']"])
    with pytest.raises(RecipeError, match="adapter-gguf cannot hold"):
        resumed(ours, recorded)
