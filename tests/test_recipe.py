"""Recipes: every problem at once, with its line and the right name; what is written reads back as the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.recipe.problems import FOREIGN_NAMES
from qlora.recipe.reading import Recipe, differing_keys, key_names, load_recipe, recipe_schema, recipe_toml

ROOT = Path(__file__).parent.parent
SMALL = '[model]\nbase = "owner/name"\n[[data.train]]\npath = "rows.jsonl"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return [(p.where.removeprefix(f"{folder}/"), p.what, p.hint) for p in caught.value.problems]


def test_smallest_recipe_has_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert recipe.train.epochs == 3.0 and recipe.train.max_steps is None
    assert recipe.quantization.type == "nf4" and recipe.lora.r == 16
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.model.base == "owner/name"


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = problems(tmp_path, '[model]\nbas = "x"\n[train]\nlearning_rate = 3\noptim = "foo"\n')
    assert [where for where, _, _ in found] == ["recipe.toml:1", "recipe.toml:2", "recipe.toml:4", "recipe.toml:5"]
    assert found[0][1] == "model.base is missing"
    assert found[1][1:] == ("unknown key model.bas", "did you mean model.base?")
    assert "less than or equal to 1 (it is 3)" in found[2][1]
    assert found[3][2] == "here this is called train.optimizer"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("micro_batch_sise = 2", "did you mean train.micro_batch_size?"),
        ("r = 8", "did you mean lora.r?"),
        ("sequence_len = 8", "here this is called data.max_length"),
        ("gradient_accumulation_steps = 4", "here this is called train.batch_size"),
        ("trust_remote_code = true", "never run here"),
        ("zzz = 1", "keys of [train]: epochs, max_steps"),
    ],
)
def test_unknown_keys_get_the_right_name(tmp_path: Path, line: str, hint: str) -> None:
    ((where, _, given),) = problems(tmp_path, SMALL + f"[train]\n{line}\n")
    assert where == "recipe.toml:6" and hint in given


def test_foreign_names_point_at_keys_that_exist() -> None:
    names = set(key_names()) | {"[[data.train]]", "[[data.eval]]"}
    for target in FOREIGN_NAMES.values():
        assert re.split(r" [=(]", target)[0] in names, target


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[lora]\nr = 0", "greater than or equal to 1"),
        ("[lora]\ndropout = 1.0", "less than 1"),
        ('[quantization]\ntype = "int8"', "'nf4', 'fp4' or 'none'"),
        ("[train]\nepochs = 2\nmax_steps = 5", "give one of them"),
        ("[train]\nbatch_size = 1\nmicro_batch_size = 4", "more than train.batch_size"),
        ("[data]\neval_fraction = 0\n[eval]\nexact_match_rows = 5", "eval_fraction is 0"),
        ('[lora]\nuse_dora = true\ninit = "eva"', "cannot go together"),
    ],
)
def test_wrong_values_say_what_is_allowed(tmp_path: Path, line: str, message: str) -> None:
    ((where, what, hint),) = problems(tmp_path, SMALL + line + "\n")
    assert message in what and where.startswith("recipe.toml:") and hint


@pytest.mark.parametrize(
    ("text", "line"),
    [("[model\nbase = 1", 1), ("[model]\nbase = owner/name", 2), ('[model]\nbase = "a"\nbase = "b"', 3)],
)
def test_broken_toml_has_a_line(tmp_path: Path, text: str, line: int) -> None:
    ((where, what, _),) = problems(tmp_path, text)
    assert where == f"recipe.toml:{line}" and "not valid TOML" in what


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "none.toml", "no such recipe")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    (tmp_path / "latin.toml").write_bytes(b'[model]\nbase = "\xe9"')
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.toml")


def test_overrides_are_toml_values_or_strings(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "[train]\nepochs = 2\n")
    recipe = load_recipe(
        path,
        ["train.max_steps=7", "model.base=other/name", "data.train.0.weight=0.5", 'lora.target_modules=["q_proj"]'],
    )
    assert recipe.train.max_steps == 7 and recipe.train.epochs is None
    assert recipe.model.base == "other/name" and recipe.data.train[0].weight == 0.5
    assert recipe.lora.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "is not table.key=value"),
        ("train.seed", "is not table.key=value"),
        ("train.sed=1", "unknown key train.sed"),
        ("train.seed=x", "train.seed is wrong"),
        ("data.train.3.path=x", "there is no entry '3'"),
        ("model.base.x=1", "is a value, not a table"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    ((where, what, _),) = problems(tmp_path, SMALL, override)
    assert message in what and where == f"--set {override}"


def test_lines_survive_multiline_values_and_comments(tmp_path: Path) -> None:
    text = '[model]\nbase = """x"""\n[lora]\ntarget_modules = [\n  "q_proj", # [\n]\n# r = 3\nrr = 4\n'
    text += '[[data.train]]\npath="a"\n[[data.train]]\npathh="b"\n'
    found = problems(tmp_path, text)
    assert [where for where, _, _ in found] == ["recipe.toml:8", "recipe.toml:11", "recipe.toml:12"]


def test_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), ["lora.r=4"])
    (tmp_path / "again.toml").write_text(recipe_toml(recipe))
    again = load_recipe(tmp_path / "again.toml")
    assert again == recipe and differing_keys(again, recipe) == []


def test_differing_keys_leave_out_what_cannot_change_the_result(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    one, other = load_recipe(path), load_recipe(path, ["train.seed=7", "output.dir=x", "checkpoint.keep=9", "lora.r=2"])
    assert differing_keys(one, other) == ["lora.r", "train.seed"]


def test_folders_become_absolute_and_hub_names_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert load_recipe(write(tmp_path, SMALL), ["model.base=base"]).model.base == str(tmp_path / "base")
    assert load_recipe(write(tmp_path, SMALL), ["model.base=./missing"]).model.base == str(tmp_path / "missing")
    assert load_recipe(write(tmp_path, SMALL), ["model.base=owner/name"]).model.base == "owner/name"


def test_shipped_schema_is_the_current_one() -> None:
    """After a change of a key: qlora-train --schema > recipes/recipe.schema.json"""
    assert json.loads((ROOT / "recipes/recipe.schema.json").read_text()) == recipe_schema()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert path.read_text().startswith("#:schema ./recipe.schema.json\n")
    recipe = load_recipe(path)
    assert recipe.data.train


def test_every_key_is_in_the_readme() -> None:
    readme = (ROOT / "recipes" / "README.md").read_text()
    for name in key_names():
        table, _, key = name.rpartition(".")
        assert f"`{key}`" in readme, f"{table}.{key}"


def test_a_recipe_object_can_be_made_in_python() -> None:
    recipe = Recipe.model_validate({"model": {"base": "owner/name"}, "data": {"train": [{"path": "x.jsonl"}]}})
    assert recipe.data.train[0].format == "auto"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export.formats=['gguf:q4km']"], "did you mean 'gguf:q4_k_m'"),
        (["export.imatrix=true"], "export.imatrix weighs the rounding"),
        (["export.imatrix=true", "export.formats=['gguf:q8_0']"], "export.imatrix weighs the rounding"),
        (["export.max_kl=0.1"], "export.max_kl is for merged models"),
        (["export.formats=['adapter-gguf']", "lora.use_dora=true"], "adapter-gguf cannot hold"),
    ],
)
def test_what_export_could_not_do_is_found_before_training(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[model]\nbase = "owner/name"\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert any(message in problem.what for problem in caught.value.problems)
