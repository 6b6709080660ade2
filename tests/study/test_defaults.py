"""What documents decide of a recipe: only of keys that nobody set, and by how much there is to learn."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.events import Recorder
from qlora.recipe.reading import Recipe
from qlora.study import defaults


def recipe(**tables: Any) -> Recipe:
    documents = {"data": {"documents": [{"path": "manuals"}], **tables.pop("data", {})}}
    return Recipe.model_validate({"model": {"base": "owner/name"}, **documents, **tables})


@pytest.mark.parametrize(("pages", "rank"), [(1, 32), (500, 32), (501, 64), (3000, 64), (3001, 128)])
def test_rank_grows_with_the_pages(pages: int, rank: int) -> None:
    derived, said = defaults.of_corpus(recipe(), pages)
    assert (derived.lora.r, derived.lora.alpha, derived.train.learning_rate) == (rank, 2.0 * rank, 5e-4)
    assert derived.data.eval_fraction == 0.0
    assert said[0] == f"lora.r = {rank}" and "train.learning_rate = 0.0005" in said


def test_what_is_set_stays() -> None:
    own = recipe(lora={"r": 8}, train={"learning_rate": 1e-3}, data={"eval_fraction": 0.1})
    derived, said = defaults.of_corpus(own, 9000)
    assert (derived.lora.r, derived.lora.alpha) == (8, 16.0)  # twice the rank that the user set
    assert derived.train.learning_rate == 1e-3 and derived.data.eval_fraction == 0.1
    assert said == ("lora.alpha = 16",)


def test_rows_to_evaluate_on_are_not_forgotten() -> None:
    assert defaults.of_corpus(recipe(data={"eval": [{"path": "x.jsonl"}]}), 1)[0].data.eval_fraction == 0.05


@pytest.mark.parametrize(
    ("rows", "sentences", "epochs"),
    [(3400, 2000, 6.0), (11_500, 2000, 2.0), (2000, 2000, 10.0), (10, 2000, 10.0), (1, 0, 10.0)],
)
def test_each_sentence_is_met_about_ten_times(rows: int, sentences: int, epochs: float) -> None:
    assert defaults.epochs(rows, sentences) == epochs


def test_who_says_how_long_it_trains() -> None:
    assert not defaults.has_length(recipe())
    assert defaults.has_length(recipe(train={"epochs": 3})) and defaults.has_length(recipe(train={"max_steps": 9}))


def test_an_estimate_takes_what_few_pages_ask_for() -> None:
    sink = Recorder()
    assert defaults.unread(recipe(), sink).lora.r == 32 and "500 pages" in sink.events[0].as_dict()["message"]
    plain = Recipe.model_validate({"model": {"base": "owner/name"}})
    assert defaults.unread(plain, sink) is plain and len(sink.events) == 1
