"""Keys about documents: [[exam.questions]] beside a number, tables without documents, what a run records of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import recorded
from qlora.errors import RecipeError
from qlora.recipe.reading import load_recipe, recipe_toml
from tests.recipe.cases import SMALL, write

DOCUMENTS = '[model]\nbase = "owner/name"\n[[data.documents]]\npath = "manuals"\nabout = "manuals of lamps"\n'


def test_the_smallest_recipe_with_documents(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, DOCUMENTS))
    (source,) = recipe.data.documents
    assert (source.path, source.about, source.language) == (str(tmp_path / "manuals"), "manuals of lamps", "auto")
    assert (recipe.study.questions, recipe.study.labels, recipe.study.probe) == (24, "soft", True)
    assert (recipe.exam.questions, recipe.exam.left_out, recipe.exam.own) == (200, 0.05, ())


@pytest.mark.parametrize(
    ("text", "questions"),
    [
        ('[[exam.questions]]\npath = "mine.jsonl"\n', 200),
        ('[exam]\nquestions = 30\n[[exam.own]]\npath = "mine.jsonl"\n', 30),
    ],
)
def test_questions_of_ones_own(tmp_path: Path, text: str, questions: int) -> None:
    recipe = load_recipe(write(tmp_path, DOCUMENTS + text))
    assert [own.path for own in recipe.exam.own] == [str(tmp_path / "mine.jsonl")]
    assert recipe.exam.questions == questions
    again, unknown = recorded.load_recorded(write(tmp_path, recipe_toml(recipe)))
    assert again.exam == recipe.exam and again.study == recipe.study and not unknown


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ('[[exam.questions]]\npath = "x"\npth = 1\n', 8, "unknown key exam.questions.0.pth"),
        ("[[exam.questions]]\ncolumns = {}\n", 6, "exam.questions.0.path is missing"),
        ("[study]\nquestions = 0\n", 7, "study.questions is wrong"),
        ('[study]\nkinds = ["fact", "essay"]\n', 7, "study.kinds"),
        ("[study]\nkinds = []\n", 7, "study.kinds is wrong"),
        ("[exam]\nleft_out = 0.9\n", 7, "exam.left_out is wrong"),
    ],
)
def test_a_wrong_key_is_named_with_its_line(tmp_path: Path, text: str, line: int, part: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, DOCUMENTS + text))
    (problem,) = error.value.problems
    assert problem.where.endswith(f":{line}") and part in problem.what, problem


@pytest.mark.parametrize("table", ["study", "exam"])
def test_a_study_without_documents_is_refused(tmp_path: Path, table: str) -> None:
    with pytest.raises(RecipeError, match=rf"\[{table}\] without \[\[data\.documents\]\]") as error:
        load_recipe(write(tmp_path, f"{SMALL}[{table}]\nquestions = 3\n"))
    assert "data.documents" in error.value.problems[0].hint


def test_a_run_without_documents_records_nothing_of_them(tmp_path: Path) -> None:
    text = recipe_toml(load_recipe(write(tmp_path, SMALL)))
    assert "[study]" not in text and "[exam]" not in text
    assert load_recipe(write(tmp_path, text)).data.documents == ()


def test_where_documents_lie_is_no_difference(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    here, there = (load_recipe(write(tmp_path / name, DOCUMENTS)) for name in ("a", "b"))
    assert recorded.differing_keys(here, there) == []
    other = load_recipe(write(tmp_path, DOCUMENTS + "[study]\nsure = 0.6\n"))
    assert recorded.differing_keys(here, other) == ["study.sure"]
