"""A run that goes on is the run that was begun, whatever the defaults are now, and wherever its files lie now."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.recipe.reading import Recipe, load_recipe, recipe_toml
from qlora.recipe.sections import DataSection, ModelSection, SourceSection
from qlora.recorded import differing_keys, load_recorded, resumed, whole_folders
from tests.recipe.cases import SMALL, other_defaults, write

COMMIT = "a" * 40


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


def test_a_folder_means_what_it_meant_when_the_run_began(tmp_path: Path) -> None:
    """Recorded without a split (older versions trained all of a folder), it is all of it; else the recorded split."""
    rows, file = tmp_path / "rows", tmp_path / "rows.jsonl"
    rows.mkdir()
    file.touch()
    older = recipe(COMMIT, str(rows), str(file), f"hub:owner/rows@{COMMIT}:train")
    ours = recipe("main", str(rows), str(file), "hub:owner/rows")
    merged = resumed(ours, whole_folders(older))
    paths = [source.path for source in merged.data.train]
    assert paths == [f"{rows}:all", str(file), f"hub:owner/rows@{COMMIT}:train"]
    assert differing_keys(merged, older) == []
    recorded = recipe(COMMIT, f"{rows}:train")
    evaluated = recorded.data.model_copy(update={"eval": (SourceSection(path=f"{rows}:validation"),)})
    recorded = recorded.model_copy(update={"data": evaluated})
    assert whole_folders(recorded) == recorded
    assert resumed(recipe("main", str(rows)), recorded).data == recorded.data
    assert resumed(recipe("main", f"{rows}:test"), recorded).data.train[0].path == f"{rows}:test"


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


def test_a_recorded_recipe_is_read_whichever_version_wrote_it(tmp_path: Path) -> None:
    """Keys of a newer one are left out and named; what is not there and may be None was None."""
    recipe = load_recipe(write(tmp_path, SMALL))
    text = recipe_toml(recipe).replace("[lora]\n", "[lora]\nrho = 3\n") + '[cloud]\nname = "x"\n'
    file = tmp_path / "recorded.toml"
    file.write_text(text.replace('format = "auto"\n', 'format = "auto"\nsplit = "a"\n'))
    with other_defaults({"train.max_minutes": 60.0, "export.max_kl": 0.1}):
        recorded, unknown = load_recorded(file)
    assert recorded == recipe and sorted(unknown) == ["cloud", "data.train.0.split", "lora.rho"]
    file.write_text(text.replace("r = 16\n", "r = 0\n"))
    with pytest.raises(RecipeError, match=r"lora\.r is wrong"):
        load_recorded(file)


def test_where_local_files_lie_is_no_difference(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    local = '[model]\nbase = "./base"\n[[data.train]]\npath = "rows.jsonl"\n'
    recipes = []
    for folder in (here, there):
        folder.mkdir()
        recipes.append(load_recipe(write(folder, local)))
    assert recipes[0].model.base != recipes[1].model.base
    assert differing_keys(*recipes) == []
    hub = load_recipe(write(there, local), ["model.base=owner/name", "data.train.0.path=hub:owner/rows"])
    assert differing_keys(recipes[0], hub) == ["model.base", "data.train"]
    other = load_recipe(write(there, local), ["model.base=owner/other", "data.train.0.path=hub:owner/rows:test"])
    assert differing_keys(hub, other) == ["model.base", "data.train"]


def test_differing_keys_leave_out_what_cannot_change_the_result(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    one, other = load_recipe(path), load_recipe(path, ["train.seed=7", "output.dir=x", "checkpoint.keep=9", "lora.r=2"])
    assert differing_keys(one, other) == ["lora.r", "train.seed"]
