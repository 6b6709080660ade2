"""Every problem of a recipe at once, with its line and the right name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora.recipe.problems import FOREIGN_NAMES
from qlora.recipe.reading import key_names, load_recipe
from tests.recipe.cases import SMALL, problems, write


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
        ("zzz = 1", "keys of [train]: "),
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
    ("text", "line"),
    [("[model\nbase = 1", 1), ("[model]\nbase = owner/name", 2), ('[model]\nbase = "a"\nbase = "b"', 3)],
)
def test_broken_toml_has_a_line(tmp_path: Path, text: str, line: int) -> None:
    ((where, what, _),) = problems(tmp_path, text)
    assert where == f"recipe.toml:{line}" and "not valid TOML" in what


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
        ("data.train.².path=x", "there is no entry '²'"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    ((where, what, _),) = problems(tmp_path, SMALL, override)
    assert message in what and where == f"`overrides` {override}"


def test_lines_survive_multiline_values_and_comments(tmp_path: Path) -> None:
    text = '[model]\nbase = """x"""\n[lora]\ntarget_modules = [\n  "q_proj", # [\n]\n# r = 3\nrr = 4\n'
    text += '[[data.train]]\npath="a"\n[[data.train]]\npathh="b"\n'
    found = problems(tmp_path, text)
    assert [where for where, _, _ in found] == ["recipe.toml:8", "recipe.toml:11", "recipe.toml:12"]


@pytest.mark.parametrize(
    ("train", "what"),
    [
        ('"a.jsonl"', "data.train is wrong: input should be a list"),
        ('["a.jsonl"]', "train.0 is wrong: input should be a table"),
    ],
)
def test_rows_that_are_named_by_a_string_alone_are_told_how_to_stand_there(
    tmp_path: Path, train: str, what: str
) -> None:
    """The first thing that a newcomer tries; Python's types are no words for it."""
    ((where, found, hint),) = problems(tmp_path, f'[model]\nbase = "x"\n[data]\ntrain = {train}\n')
    assert what in found and "tuple" not in found and '[[data.train]] with path = "..."' in hint
    assert where == "recipe.toml:4"
