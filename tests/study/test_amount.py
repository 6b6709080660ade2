"""How much work a run with documents has: it grows with what causes it, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.recipe.reading import load_recipe
from qlora.study.amount import AROUND, LITTLE, OWN, Documents, Work, amounts, writing

MANUALS = Path(__file__).parent.parent.parent / "recipes" / "manuals.toml"
HANDBOOK = Documents(passages=40, tokens=140, sentences=270)


def test_a_batch_reads_what_it_shares_once() -> None:
    assert writing(24, 400, 30, 10, 24) == Work(11, 400 + 24 * 30 + 24 * 9, 24 * (30 * 415 + 10 * 435), 240)
    assert writing(25, 400, 30, 10, 24).passes == 22 and writing(24, 0, 30, 10, 24).passes == 10
    assert writing(0, 400, 30, 10, 24) == Work()


@pytest.mark.parametrize(
    ("change", "grows", "stays"),
    [
        ("study.questions=48", ("study", "training"), ("exam",)),
        ("exam.questions=400", ("study", "exam"), ("training",)),
        ("train.epochs=24", ("training",), ("study", "exam")),
        ("study.probe=true", (), ("study", "exam", "training")),
    ],
)
def test_what_a_recipe_asks_for_is_what_it_costs(change: str, grows: tuple[str, ...], stays: tuple[str, ...]) -> None:
    usual = amounts(load_recipe(MANUALS), Documents(40, 140, 800), False)
    other = amounts(load_recipe(MANUALS, [change]), Documents(40, 140, 800), False)
    for before, after in zip(usual, other, strict=True):
        for part in grows:
            assert getattr(after, part).tokens > 1.1 * getattr(before, part).tokens, part
        for part in stays:
            assert getattr(after, part) == getattr(before, part), part


def test_twice_the_passages_are_twice_the_study() -> None:
    recipe = load_recipe(MANUALS, ["exam.questions=0", "study.probe=false", "study.hold=0"])
    one, two = (amounts(recipe, Documents(count, 140, 7 * count), False)[0] for count in (40, 80))
    assert two.study.tokens == pytest.approx(2 * one.study.tokens) and one.exam == Work()
    assert one.study.tokens > 40 * (140 + AROUND) and one.training.tokens > 40 * 24 * LITTLE.kept * LITTLE.row * 12


def test_what_the_handbook_took_lies_between() -> None:
    """Of the handbook's run, seed 42: 568 passes that wrote, 368,000 tokens read; 696 steps of 394 tokens."""
    least, most = amounts(load_recipe(MANUALS), HANDBOOK, False)
    assert least.study.tokens < 368_000 + 53_000 < most.study.tokens
    assert least.training.tokens < 4 * 696 * 394 < most.training.tokens
    assert least.training.seen < least.training.tokens * 37, "a row of a pack sees itself alone"


def test_steps_and_the_study_say_how_long_is_trained() -> None:
    for batch_size, tokens in (("2", 200 * 400), ("'auto'", 100 * 400)):
        recipe = load_recipe(MANUALS, [f"train.batch_size={batch_size}"])
        steps = recipe.train.model_copy(update={"epochs": None, "max_steps": 100})
        ways = amounts(recipe.model_copy(update={"train": steps}), HANDBOOK, False)
        assert [way.training.tokens for way in ways] == [pytest.approx(4 * tokens)] * 2
    decided = amounts(load_recipe(MANUALS), HANDBOOK, True)[0]
    assert 0 < decided.training.tokens < amounts(load_recipe(MANUALS), HANDBOOK, False)[0].training.tokens
    own = Documents(40, 140, 270, own_tokens=1_000_000)
    assert amounts(load_recipe(MANUALS), own, False)[0].training.tokens > 4 * 12 * 1_000_000
    assert OWN < AROUND + OWN
