"""A recipe that we write: valid, commented, its schema beside it, and never over what is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora import recipe_file
from qlora.errors import RecipeError, UserError
from qlora.recipe.reading import load_recipe

TABLE = {
    "model": {"base": "owner/name"},
    "lora": {"r": 8},
    "data": {"train": [{"path": "x.jsonl", "columns": {"a b": "c"}}]},
}


def test_it_reads_back_and_says_what_it_is_told(tmp_path: Path) -> None:
    path = recipe_file.target_of(tmp_path / "first.toml")
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "base").mkdir()
    table = {**TABLE, "model": {"base": str(tmp_path / "base")}}
    table["data"] = {"max_length": 64, "train": [{"path": str(tmp_path / "rows.jsonl")}, *TABLE["data"]["train"]]}  # type: ignore[index]
    recipe_file.write(path, table, ["one", 'two "\n[lora]\nr = 4\x1b[0m'], {"lora.r": "why\nr = 5"})
    text = path.read_text()
    assert 'base = "./base"' in text and 'path = "rows.jsonl"' in text  # as the folder may be moved
    assert text.startswith("#:schema ./recipe.schema.json\n# one\n# two ") and "# why␊r = 5" in text
    recipe = load_recipe(path)
    assert recipe.lora.r == 8 and recipe.data.train[1].columns == {"a b": "c"}
    assert recipe.model.base == str(tmp_path / "base") and recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert "properties" in json.loads((tmp_path / "recipe.schema.json").read_text())


def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    for name in ("file.toml", "folder.toml", "link.toml"):
        place = tmp_path / name
        place.mkdir() if name.startswith("folder") else place.symlink_to("nowhere") if "link" in name else place.touch()
        with pytest.raises(UserError, match="nothing is overwritten"):
            recipe_file.target_of(place)
    (tmp_path / "recipe.schema.json").write_text("mine")
    recipe_file.write(tmp_path / "new.toml", TABLE, [], {})
    assert (tmp_path / "recipe.schema.json").read_text() == "mine"
    with pytest.raises(OSError, match="exists"):
        recipe_file.write(tmp_path / "new.toml", TABLE, [], {})
    if hasattr(os, "symlink"):
        assert not (tmp_path / "nowhere").exists()


def test_what_is_no_recipe_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        recipe_file.write(tmp_path / "bad.toml", {"model": {"base": "a/b"}, "lora": {"r": -1}}, [], {})
    assert not list(tmp_path.iterdir())
    for name in ("x.yaml", "x", "no/such/folder.toml"):
        with pytest.raises(UserError):
            recipe_file.target_of(tmp_path / name)


def test_very_many_lines_of_a_stranger_are_cut(tmp_path: Path) -> None:
    assert recipe_file.text_of(TABLE, ["x"] * 5000, {}).count("\n") < 250


@pytest.mark.parametrize("name", ["con.toml", "n" * 201 + ".toml", "...toml"])
def test_a_name_that_no_run_can_have_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="a run is called like its recipe"):
        recipe_file.target_of(tmp_path / name)
