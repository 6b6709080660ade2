"""Keys of grpo: defaults of their sources, rewards that a recipe may name, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.grpo_keys import KEYS
from qlora.recipe.reading import Recipe, load_recipe, recipe_toml
from qlora.recorded import differing_keys


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    folder.mkdir(exist_ok=True)
    path = folder / "r.toml"
    path.write_text(
        '[model]\nbase = "owner/name"\n[[data.train]]\npath = "rows.jsonl"\n[train]\nobjective = "grpo"\n'
        'rewards = ["exact_match", "regex:^[0-9]+$", "json_schema:answer.json"]\n'
    )
    return load_recipe(path, overrides)


def test_what_is_not_given_is_as_its_source_has_it(tmp_path: Path) -> None:
    train = recipe_of(tmp_path).train
    assert (train.num_generations, train.temperature, train.num_iterations, train.max_completion_length) == (
        8,
        1,
        1,
        256,
    )
    assert train.clip == (0.2, 0.2) and train.strength == 0.04 and train.scale_rewards == "group"
    assert recipe_of(tmp_path, "train.epsilon_high=0.28").train.clip == (0.2, 0.28)


def test_a_schema_lies_where_the_recipe_does_and_the_recipe_reads_back(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert recipe.train.rewards[2] == f"json_schema:{tmp_path / 'answer.json'}"
    (tmp_path / "again.toml").write_text(recipe_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    assert not differing_keys(recipe, recipe_of(tmp_path / "moved"))
    other = recipe.train.model_copy(update={"rewards": recipe.train.rewards[:2]})
    assert differing_keys(recipe, recipe.model_copy(update={"train": other})) == ["train.rewards"]


def test_a_recipe_of_another_objective_writes_none_of_them_out(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[model]\nbase = "owner/name"\n')
    text = recipe_toml(load_recipe(tmp_path / "r.toml"))
    assert not [key for key in KEYS if f"\n{key} = " in text]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.rewards=['exactmatch']", "did you mean 'exact_match'"),
        ("train.rewards=['exact_match:x']", "unknown reward"),
        ("train.rewards=['regex:']", "unknown reward"),
        ("train.rewards=['rewards.py:score']", "a recipe runs no code"),
        ("train.rewards=['regex:(?=a)b']", "cannot be matched safely"),
        ("train.rewards=['regex:(a{1000}){1000}']", "too large to be matched"),
        ("train.rewards=['exact_match', 'exact_match']", "names one of them twice"),
        ("train.reward_weights=[1.0]", "1 numbers for 3 rewards"),
        ("train.epsilon_high=0.1", "epsilon_high is the upper side"),
        ("train.num_generations=1", "greater than or equal to 2"),
        ("train.max_completion_length=2048", "leaves no room for a question"),
        ("train.neftune_alpha=5", "compares probabilities with those of the drawing"),
        ("train.objective='sft'", "does not read rewards"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(tmp_path, override)


def test_a_micro_batch_may_hold_all_answers_of_a_step(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, "train.batch_size=2", "train.micro_batch_size=16").train.answers_per_row == 8
    with pytest.raises(RecipeError, match="micro_batch_size"):
        recipe_of(tmp_path, "train.batch_size=2", "train.micro_batch_size=17")
