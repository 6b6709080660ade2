"""A first recipe: base and rows are looked at, it fits, it passes a check, and what cannot be read is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora import api, new_recipe
from qlora.errors import DataError, DoesNotFit, ModelError, UserError
from qlora.events import Recorder
from qlora.recipe.reading import Recipe, load_recipe
from tests.runs import write_rows


def test_it_fits_its_rows_and_passes_a_check(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    written = new_recipe.first_recipe("first.toml", str(llama), "rows.jsonl", sink=Recorder())
    assert written.path == tmp_path / "first.toml" and "30 rows" in written.said[0]
    recipe = load_recipe(written.path)
    assert recipe.data.max_length == 256 and recipe.data.eval_fraction == 0.05 and recipe.lora.r == 16
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    checked = api.check(written.path)
    assert checked.memory is not None and checked.memory.fits and len(checked.data.train.lengths) == 28
    text = written.path.read_text()
    assert "no row is longer" in text and "GiB at its peak" in text and text.startswith("#:schema")
    with pytest.raises(UserError, match="nothing is overwritten"):
        new_recipe.first_recipe("first.toml", str(llama), "rows.jsonl")


def test_few_long_rows_are_cut_to_what_the_base_can_and_none_is_held_out(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "x", "completion": "{"word " * 9000}"}}\n')
    new_recipe.first_recipe(tmp_path / "first.toml", str(llama), str(tmp_path / "rows.jsonl"))
    recipe = load_recipe(tmp_path / "first.toml")
    assert recipe.data.truncation == "cut" and recipe.data.eval_fraction == 0.0
    assert "rows are longer and cut to it" in (tmp_path / "first.toml").read_text()


def test_where_it_does_not_fit_rows_are_shorter_and_where_nothing_fits_nothing_is_written(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner says what fits (tests/memory/test_plan.py); a check of that is what is written."""
    write_rows(tmp_path / "rows.jsonl")
    asked, plans, real = (
        [],
        [SimpleNamespace(data=SimpleNamespace(max_length=32), lora=SimpleNamespace(r=4))],
        api.check,
    )

    def check(recipe: Recipe, sink: object) -> api.Checked:
        asked.append(recipe.data.max_length)
        if recipe.data.max_length > 32:
            raise DoesNotFit("too large", "a smaller one")
        return real(recipe)

    question = SimpleNamespace(
        search=lambda: [SimpleNamespace(recipe=plan) for plan in plans],
        does_not_fit=lambda: DoesNotFit("nothing", "fits"),
    )
    monkeypatch.setattr(api, "check", check)
    monkeypatch.setattr(api, "question", lambda recipe, sink: question)
    new_recipe.first_recipe(tmp_path / "first.toml", str(llama), str(tmp_path / "rows.jsonl"))
    recipe = load_recipe(tmp_path / "first.toml")
    assert asked == [256, 32] and (recipe.data.max_length, recipe.data.truncation) == (32, "cut")
    assert (recipe.lora.r, recipe.lora.alpha) == (4, 8) and "256 does not fit here" in (
        tmp_path / "first.toml"
    ).read_text()
    plans.clear()
    with pytest.raises(DoesNotFit, match="nothing"):
        new_recipe.first_recipe(tmp_path / "second.toml", str(llama), str(tmp_path / "rows.jsonl"))
    assert not (tmp_path / "second.toml").exists()


def test_a_base_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "rows.jsonl")
    written = new_recipe.first_recipe(tmp_path / "first.toml", "owner/nothing-here", str(tmp_path / "rows.jsonl"))
    assert "was not looked at" in written.said[0]
    assert (
        "was not looked at" in written.path.read_text() and load_recipe(written.path).model.base == "owner/nothing-here"
    )


def test_what_the_user_can_mend_is_refused_before_anything_is_written(tmp_path: Path, llama: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "empty").mkdir()
    for base, rows, error in (
        (str(llama), "gone.jsonl", DataError),
        ("./no/such/folder", "rows.jsonl", ModelError),
        (str(tmp_path / "empty"), "rows.jsonl", ModelError),
    ):
        with pytest.raises(error):
            new_recipe.first_recipe(tmp_path / "first.toml", base, str(tmp_path / rows))
    assert not (tmp_path / "first.toml").exists()


def test_a_home_that_is_nobodys_is_said(tmp_path: Path, llama: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    for base, rows in ((str(llama), "~nobody-here/rows.jsonl"), ("~nobody-here/base", str(tmp_path / "rows.jsonl"))):
        with pytest.raises(UserError, match="no such home folder"):
            new_recipe.first_recipe(tmp_path / "first.toml", base, rows)
    assert not (tmp_path / "first.toml").exists()


def test_rows_that_are_a_link_keep_its_name(tmp_path: Path, llama: Path) -> None:
    """A link may lead to a file whose own name tells no kind."""
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").rename(tmp_path / "blob")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "blob")
    new_recipe.first_recipe(tmp_path / "first.toml", str(llama), str(tmp_path / "rows.jsonl"))
    assert load_recipe(tmp_path / "first.toml").data.train[0].path == str(tmp_path / "rows.jsonl")
