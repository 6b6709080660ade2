"""A look at a study before its run: what is refused before anything is loaded. The study: test_documents_run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.cli.data import app
from qlora.errors import RecipeError, RunFolderError
from qlora.look_study import _dropped, look_at_study
from tests.training.cases import write_manuals


def test_without_documents_there_is_nothing_to_study(tmp_path: Path) -> None:
    recipe = tmp_path / "rows.toml"
    recipe.write_text('[model]\nbase = "none"\n[[data.train]]\npath = "rows.jsonl"\n')
    with pytest.raises(RecipeError, match="nothing to study"):
        look_at_study(recipe)


def test_a_run_that_trains_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_manuals(tmp_path, tmp_path / "no-base")
    (tmp_path / "runs" / "learn" / "adapter").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        app([str(recipe), "--study", "--json"])
    said = capfd.readouterr()
    assert end.value.code == 2 and not said.out and len(said.err.strip().splitlines()) == 2
    assert "trains already" in said.err and "--fresh" in said.err
    assert [path.name for path in (tmp_path / "runs" / "learn").iterdir()] == ["adapter"]


def test_somebody_else_s_folder_is_left_alone(tmp_path: Path) -> None:
    recipe = write_manuals(tmp_path, tmp_path / "no-base")
    (tmp_path / "runs" / "learn").mkdir(parents=True)
    (tmp_path / "runs" / "learn" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"thesis\.txt"):
        look_at_study(recipe)


def test_what_was_dropped_is_read_as_a_stranger_s(tmp_path: Path) -> None:
    file = tmp_path / "dropped.jsonl"
    line = '{"reason": "%s", "question": "Why?", "answer": null, "text": "x", "detail": "d"}\n'
    file.write_text(line % "form" + line % "own reason" + line % "form")
    first, second = _dropped(file, 1)
    assert (first.reason, first.count, len(first.examples)) == ("form", 2, 1) and "40 words" in first.said
    assert second.said == "own reason" and second.examples[0].answer == ""
    for bad in ("{broken\n", "[1]\n"):
        file.write_text(bad)
        with pytest.raises(RunFolderError, match=r"dropped\.jsonl"):
            _dropped(file, 1)
