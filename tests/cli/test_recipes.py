"""`--import` and `--new` as a user runs them: what is printed, exit codes, and nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.cli import recipes
from qlora.errors import RecipeError, UserError
from tests.cli.cases import expect_two_lines, run

THEIRS = "base_model: a/b\nsequence_len: 64\nadapter: qlora\nlora_r: 4\nmystery: 1\nwandb_token: abcdef\n"


def test_an_import_says_what_became_of_each_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yml").write_text(THEIRS)
    recipes.import_recipe(Path("theirs.yml"), None)
    said = capsys.readouterr().out
    assert "lora_r → lora.r = 4" in said and "NOT CARRIED (2)" in said and "mystery = 1 · not known here" in said
    assert "--check" in said and "abcdef" not in said + (tmp_path / "theirs.toml").read_text()
    with pytest.raises(UserError, match="nothing is overwritten"):
        recipes.import_recipe(Path("theirs.yml"), None)
    recipes.import_recipe(Path("theirs.yml"), Path("other.toml"))
    assert (tmp_path / "other.toml").read_text() == (tmp_path / "theirs.toml").read_text()


@pytest.mark.parametrize(
    ("given", "lacks"),
    [
        ((Path("a.toml"), None, None), "--base BASE and --data PATH"),
        ((None, "a/b", "x"), "--new NAME.toml"),
        ((Path("a.toml"), "a/b", None), "--data PATH"),
    ],
)
def test_what_a_first_recipe_lacks_is_named(given: tuple[Path | None, str | None, str | None], lacks: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipes.first_recipe(*given)
    assert error.value.problems[0].what == f"a first recipe needs {lacks}"


def test_a_file_of_nobody_ends_with_two_lines(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("a: !!python/name:os.system b\n")
    expect_two_lines(run("--import", "x.yml", cwd=tmp_path), "has the tag")
