"""Recipes are read, checked as a whole, and written so that they read back as the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.recipe.reading import load_recipe, recipe_toml
from qlora.recorded import differing_keys
from tests.recipe.cases import SMALL, problems, write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[lora]\nr = 0", "greater than or equal to 1"),
        ("[lora]\ndropout = 1.0", "less than 1"),
        ('[quantization]\ntype = "int8"', "'nf4', 'fp4' or 'none'"),
        ("[train]\nepochs = 2\nmax_steps = 5", "give one of them"),
        ("[train]\nbatch_size = 1\nmicro_batch_size = 4", "more than train.batch_size"),
        ("[memory]\noffload_activations = true\n[train]\ngradient_checkpointing = false", "recomputes no layer"),
        ("[data]\neval_fraction = 0\n[eval]\nexact_match_rows = 5", "eval_fraction is 0"),
        ('[lora]\nuse_dora = true\ninit = "eva"', "cannot go together"),
    ],
)
def test_wrong_values_say_what_is_allowed(tmp_path: Path, line: str, message: str) -> None:
    ((where, what, hint),) = problems(tmp_path, SMALL + line + "\n")
    assert message in what and where.startswith("recipe.toml:") and hint


@pytest.mark.parametrize(
    "key", ["memory.stream_weights", "memory.offload_activations", "memory.cache", "model.compile"]
)
def test_what_a_program_may_decide_names_auto(tmp_path: Path, key: str) -> None:
    table, _, name = key.partition(".")
    wrong = SMALL.replace("[model]", f"[model]\n{name} = 3") if table == "model" else f"{SMALL}[{table}]\n{name} = 3\n"
    ((_, what, hint),) = problems(tmp_path, wrong)
    assert f"{key} is wrong" in what and hint.startswith(f'{key}: true, false or "auto": ')


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "none.toml", "no such recipe")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    (tmp_path / "latin.toml").write_bytes(b'[model]\nbase = "\xe9"')
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.toml")


def test_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), ["lora.r=4"])
    (tmp_path / "again.toml").write_text(recipe_toml(recipe))
    again = load_recipe(tmp_path / "again.toml")
    assert again == recipe and differing_keys(again, recipe) == []


def test_folders_become_absolute_and_hub_names_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert load_recipe(write(tmp_path, SMALL), ["model.base=base"]).model.base == str(tmp_path / "base")
    assert load_recipe(write(tmp_path, SMALL), ["model.base=./missing"]).model.base == str(tmp_path / "missing")
    assert load_recipe(write(tmp_path, SMALL), ["model.base=owner/name"]).model.base == "owner/name"


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


def test_folders_whose_names_are_not_utf8_are_said(tmp_path: Path) -> None:
    folder = Path(f"{tmp_path}/\udcff")
    folder.mkdir()
    (folder / "r.toml").write_text(SMALL)
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(folder / "r.toml")


def test_a_side_without_sources_is_not_set(tmp_path: Path) -> None:
    """A resumed run takes the evaluation rows that it recorded; an empty list says that there are none."""
    recipe = load_recipe(write(tmp_path, SMALL))
    assert recipe.data.model_fields_set == {"train"}
    assert load_recipe(write(tmp_path, SMALL), ["data.eval=[]"]).data.model_fields_set == {"train", "eval"}


def test_every_path_that_nobody_could_open_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        '[model]\nbase = "~no-such-user/base"\n[[data.train]]\npath = "~no-such-user/rows"\n'
        '[[data.eval]]\npath = "~no-such-user/more"\n[output]\ndir = "~no-such-user"\n'
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert [problem.where for problem in error.value.problems] == [f"{file}:{line}" for line in (2, 4, 6, 8)]
