"""What the estimator says of published shapes, against published figures and the cards that recipes are named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import api
from qlora.memory import hardware
from qlora.memory.estimate import Estimate
from qlora.memory.plan import Planner, changed, gib
from qlora.memory.trace import CATEGORIES
from qlora.recipe.reading import load_recipe
from tests.memory.shapes import SHAPES, config_folder

RECIPES = Path(__file__).parent.parent.parent / "recipes"
NAMES = {8: "meta-llama/Llama-3.1-8B-Instruct", 70: "meta-llama/Llama-3.1-70B-Instruct"}
GIB = 1 << 30
# Recipes that name no card: the smallest one that the README promises them.
SMALLEST_CARD = {"llama-3.2-1b": 6, "smollm2-135m": 6}


def ask(parent: Path, billions: int, *overrides: str, **card: str) -> Estimate:
    recipe = api.recipe_or_model(str(config_folder(NAMES[billions], parent)), overrides)
    return api.question(recipe, **card).estimate()


def test_the_parts_add_up_and_are_all_there(tmp_path: Path) -> None:
    estimate = ask(tmp_path, 8, gpu="RTX 4090")
    assert tuple(estimate.components) == (*CATEGORIES, "context")
    assert sum(estimate.components.values()) == estimate.peak_bytes == max(estimate.phases.values())
    assert set(estimate.phases) == {"load", "train", "evaluate", "generate", "resume", "merge"}
    assert estimate.fits and estimate.peak_bytes < estimate.limit_bytes
    # 6.98e9 values at 0.5 byte and 0.127 bit, 1.05e9 in bf16: QLoRA section 3, Llama 3.1's shape.
    assert estimate.components["weights"] == pytest.approx(6.979e9 * (0.5 + 0.127 / 8) + 1.051e9 * 2, rel=0.005)
    # Rank 16 on all seven layers of each block: 41.9 million parameters in bf16.
    assert estimate.components["adapters"] == pytest.approx(41_943_040 * 2, rel=0.01)


def test_a_published_measurement_is_predicted(tmp_path: Path) -> None:
    """torchtune's README: Llama 3.1 8B QLoRA on a 4090, 2 × 2,048 tokens, 7.4 GiB. Within 10 %."""
    settings = (
        *("lora.r=8", 'lora.target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'),
        *("train.micro_batch_size=2", "data.max_length=2048", "train.optimizer=adamw", "eval.samples=0"),
    )
    estimate = ask(tmp_path, 8, *settings, gpu="RTX 4090", stack="torchtune")
    assert estimate.tensor_bytes == pytest.approx(7.4 * GIB, rel=0.10)


def test_the_plain_stack_shows_what_our_settings_save(tmp_path: Path) -> None:
    ours = ask(tmp_path, 8, "train.micro_batch_size=2", gpu="RTX 4090")
    plain = ask(tmp_path, 8, "train.micro_batch_size=2", gpu="RTX 4090", stack="plain")
    # Embeddings and head in float32 are 1.05e9 × 2 bytes more; logits of 4,096 tokens × 128,256 in float32 are
    # 1.96 GiB, and at the peak there are three of them.
    assert plain.components["weights"] - ours.components["weights"] == pytest.approx(1.051e9 * 2, rel=0.01)
    assert plain.components["logits"] > 2.9 * 4096 * 128_256 * 4 and ours.components["logits"] < GIB / 2
    assert plain.peak_bytes > 1.8 * ours.peak_bytes
    assert any("plain" in note for note in plain.notes)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_every_recipe_fits_the_card_in_its_name(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    if recipe.model.base not in SHAPES:
        assert file.stem == "quickstart"
        return
    named = file.stem.rpartition("-")[2]
    gigabytes = int(named[:-2]) if named.endswith("gb") else SMALLEST_CARD[file.stem]
    local = changed(recipe, {"model.base": str(config_folder(recipe.model.base, tmp_path))})
    limit = hardware.common_cards()[f"{gigabytes} GB"]
    estimate = api.estimate_memory(local, vram=f"{limit}B")
    assert estimate.fits, f"{gib(estimate.peak_bytes)} of {gib(limit)}"


@pytest.mark.slow
def test_the_search_finds_the_fastest_that_fits_and_its_changes_fit(tmp_path: Path) -> None:
    recipe = api.recipe_or_model(str(config_folder(NAMES[8], tmp_path)), ["data.max_length=4096"])
    question = api.question(recipe, vram="7GiB")
    assert not question.estimate().fits
    plans = question.search()
    assert plans and all(plan.estimate.fits for plan in plans)
    speeds = [plan.estimate.tokens_per_second for plan in plans]
    assert speeds == sorted(speeds, reverse=True) and "data.max_length" in plans[0].changes
    again = api.question(changed(recipe, plans[0].changes), vram="7GiB").estimate()
    assert again.fits and again.peak_bytes == plans[0].estimate.peak_bytes


def test_room_is_used_for_speed(tmp_path: Path) -> None:
    recipe = api.recipe_or_model(str(config_folder("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path)))
    best = api.question(recipe, vram="24GiB").search()[0]
    assert best.changes["train.gradient_checkpointing"] is False and best.changes["train.micro_batch_size"] >= 4


@pytest.mark.slow
def test_each_remedy_is_cheapest_first_and_enough(tmp_path: Path) -> None:
    recipe = api.recipe_or_model(
        str(config_folder(NAMES[8], tmp_path)), ["train.micro_batch_size=8", "train.gradient_checkpointing=false"]
    )
    planner = Planner(api.question(recipe, vram="30GiB").estimator)
    remedies = planner.remedies(recipe)
    assert "train.micro_batch_size" in remedies[0].changes
    for remedy in remedies:
        assert planner.ask(changed(recipe, remedy.changes)).fits and remedy.saved_bytes > 0


@pytest.mark.slow
def test_a_base_that_is_too_large_is_said_to_be(tmp_path: Path) -> None:
    recipe = api.recipe_or_model(str(config_folder(NAMES[8], tmp_path)))
    error = api.question(recipe, vram="4GiB").does_not_fit()
    assert "nothing is enough with this base" in error.hint and "are the base's weights" in error.what
