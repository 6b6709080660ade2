"""Keys of objectives: each is read by the one that takes it, and rows of another objective are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.objective_keys import BETAS, LEARNING_RATES, OBJECTIVES, ObjectiveKeys, usual_rate
from qlora.recipe.reading import Recipe, load_recipe, recipe_toml


def recipe_of(folder: Path, *overrides: str, format: str = "auto") -> Recipe:
    path = folder / "r.toml"
    path.write_text(f'[model]\nbase = "owner/name"\n[[data.train]]\npath = "rows.jsonl"\nformat = "{format}"\n')
    return load_recipe(path, overrides)


def test_what_is_not_given_is_as_the_papers_have_it() -> None:
    assert set(BETAS) == set(OBJECTIVES) - {"sft"}
    keys = {name: ObjectiveKeys(objective=name) for name in BETAS}  # type: ignore[arg-type]
    assert [keys[name].strength for name in BETAS] == [0.1, 0.1, 0.1, 2.0, 0.1, 0.04]
    assert [keys[name].of_answers for name in BETAS] == [0, 0, 1, 0, 0, 0]
    assert keys["simpo"].margin == 1.0 and ObjectiveKeys(objective="simpo", simpo_gamma=0).margin == 0
    weighed = ObjectiveKeys(objective="kto", desirable_weight=1.5)
    assert (weighed.of_good, weighed.of_bad, keys["kto"].of_good, keys["kto"].of_bad) == (1.5, 1, 1, 1)
    assert [name for name in BETAS if keys[name].needs_reference] == ["dpo", "ipo", "kto", "grpo"]
    assert not ObjectiveKeys(objective="grpo", beta=0).needs_reference


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        *(("sft", key) for key in ("beta=0.1", "label_smoothing=0.1", "sft_weight=1.0", "simpo_gamma=1.0")),
        *(("ipo", "label_smoothing=0.1"), ("dpo", "simpo_gamma=1.0"), ("kto", "sft_weight=1.0")),
        *(("dpo", "desirable_weight=2.0"), ("sft", "undesirable_weight=2.0")),
        *(("kto", "label_smoothing=0.1"), ("orpo", "simpo_gamma=1.0"), ("simpo", "label_smoothing=0.1")),
        *(("grpo", key) for key in ("label_smoothing=0.1", "sft_weight=1.0", "simpo_gamma=1.0")),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(tmp_path: Path, objective: str, key: str) -> None:
    with pytest.raises(RecipeError, match=f"does not read {key.partition('=')[0]}"):
        recipe_of(tmp_path, f'train.objective="{objective}"', f"train.{key}")


def test_the_rate_is_that_of_the_objective_unless_given(tmp_path: Path) -> None:
    """Given as an override, in any order, and read back from what a run keeps; a run's own is kept on resuming."""
    assert set(LEARNING_RATES) == set(OBJECTIVES) and usual_rate({}) == 2e-4
    for objective in OBJECTIVES:
        recipe = recipe_of(tmp_path, f'train.objective="{objective}"')
        assert recipe.train.learning_rate == LEARNING_RATES[objective]
        assert "learning_rate" not in recipe.train.model_fields_set
        given = recipe_of(tmp_path, "train.learning_rate=3e-3", f'train.objective="{objective}"')
        assert given.train.learning_rate == 3e-3
        (tmp_path / "kept.toml").write_text(recipe_toml(given))
        assert load_recipe(tmp_path / "kept.toml").train.learning_rate == 3e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_auto_is_what_the_objective_reads_and_the_recipe_reads_back(tmp_path: Path, objective: str) -> None:
    recipe = recipe_of(tmp_path, f'train.objective="{objective}"')
    expected = {"sft": "auto", "kto": "kto", "grpo": "grpo"}.get(objective, "preference")
    assert recipe.data.train[0].format == expected
    (tmp_path / "again.toml").write_text(recipe_toml(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        (['train.objective="dpo"', 'data.loss_on="all"'], "overrides", "compares answers alone"),
        (['train.objective="dpo"', 'data.documents=[{path="manuals"}]'], "overrides", "learnt by heart"),
    ],
)
def test_what_no_objective_of_preference_can_do(tmp_path: Path, overrides: list[str], where: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        recipe_of(tmp_path, *overrides)
    assert where in str(error.value)


@pytest.mark.parametrize(
    ("objective", "format"),
    [
        ("sft", "kto"),
        ("dpo", "text"),
        ("simpo", "kto"),
        ("kto", "alpaca"),
        ("sft", "grpo"),
        ("dpo", "grpo"),
        ("grpo", "text"),
    ],
)
def test_the_line_of_a_format_that_does_not_fit_is_named(tmp_path: Path, objective: str, format: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(tmp_path, f'train.objective="{objective}"', format=format)
    assert "r.toml:5: data.train has rows of format" in str(error.value)


def test_pairs_are_for_kto_too(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, 'train.objective="kto"', format="preference").data.train[0].format == "preference"
