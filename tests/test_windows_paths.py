"""Paths of Windows in a recipe: in double quotes, and on a system that has no drives."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import wsl
from qlora.data.sources import source_files
from qlora.errors import QloraError, RecipeError
from qlora.events import Recorder
from qlora.model.resolve import resolve
from qlora.recipe.reading import load_recipe
from qlora.recipe.sections import SourceSection
from qlora.windows_paths import how_to_write, in_single_quotes

START = '[model]\nbase = "owner/name"\n[[data.train]]\n'


@pytest.mark.parametrize("path", [r"C:\Users\me\rows.jsonl", r"D:\data\x41.jsonl", r"\\server\share", r"C:\My \Docs"])
def test_a_backslash_in_double_quotes_is_told_to_stand_in_single_ones(tmp_path: Path, path: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(f'{START}path = "{path}"\n')
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert error.value.problems[0].where == f"{file}:4"
    assert error.value.hint == f"in double quotes a backslash begins an escape; write '{path}'"
    file.write_text(f"{START}path = '{path}'\n")
    assert load_recipe(file).data.train[0].path.endswith(path)


@pytest.mark.parametrize("path", [r"C:\temp\new.jsonl", r"C:\rows\b.jsonl", r"notes\test.jsonl"])
def test_a_path_that_lost_letters_to_escapes_is_written_out(tmp_path: Path, path: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(f'{START}path = "{path}"\n')
    hint = how_to_write(Path(load_recipe(file).data.train[0].path))
    assert hint == f"in double quotes a backslash begins an escape; write '{path}'"


def test_a_path_of_windows_is_named_as_wsl_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsl.platform, "release", lambda: "6.8.0-48-generic")
    assert "WSL" not in how_to_write(Path(r"C:\Users\me\x"))
    monkeypatch.setattr(wsl.platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    seen = "it is a path of Windows; WSL has it as /mnt/c/Users/me/x"
    assert how_to_write(tmp_path / r"C:\Users\me\x") == how_to_write(Path(r"C:\Users\me\x")) == seen
    with pytest.raises(QloraError) as error:
        resolve(str(tmp_path / r"C:\Users\me\x"), "main", Recorder())
    assert error.value.hint == seen
    with pytest.raises(QloraError) as error:
        source_files(SourceSection(path=str(tmp_path / r"C:\Users\me\x.jsonl")))
    assert error.value.hint == f"{seen}.jsonl"


@pytest.mark.parametrize("path", ["/data/rows.jsonl", "/data/a:b.jsonl", "rows", "/c:/rows", "/data/x:y/z", "/a/C:"])
def test_other_paths_are_left_alone(path: str) -> None:
    assert how_to_write(Path(path)) == ""


@pytest.mark.parametrize("line", ["", "path = rows.jsonl", r"path = 'C:\x", 'base = "owner/name'])
def test_other_lines_get_the_general_hint(line: str) -> None:
    assert in_single_quotes(line) == ""
