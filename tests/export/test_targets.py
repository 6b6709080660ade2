"""Where an export may be written, told by files and not by how a path is spelled."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import disk, run_folder
from qlora.errors import ExportError, TargetTaken
from qlora.export import targets
from qlora.recipe.reading import Recipe, load_recipe


def recipe(tmp_path: Path, rows: str) -> Recipe:
    file = tmp_path / "tiny.toml"
    file.write_text(f'[model]\nbase = "owner/base"\n[[data.train]]\npath = "{rows}"\n')
    return load_recipe(file)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in ("base", "rows/deep", "runs/tiny/adapter", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "rows" / "a.jsonl").touch()
    run_folder.write_recipe(tmp_path / "runs" / "tiny", recipe(tmp_path, "rows"), None)
    return tmp_path


@pytest.mark.parametrize(
    ("out", "rows", "what"),
    [
        ("base", "rows", "holds the base"),
        ("base/new", "rows", "lies in the base"),
        ("", "rows", "holds the adapter"),
        ("rows", "rows", "holds the rows"),
        ("rows/new", "rows", "lies in the rows"),
        ("rows", "rows/a.jsonl", "holds the rows"),
        ("rows", "rows/*.jsonl", "holds the rows"),
        ("rows/deep", "rows/deep/**/*.jsonl", "holds the rows"),
        ("runs/tiny/adapter/new", "rows", "lies in the adapter"),
    ],
)
def test_an_export_neither_holds_nor_lies_in_what_it_is_made_of(project: Path, out: str, rows: str, what: str) -> None:
    adapter, base = project / "runs" / "tiny" / "adapter", project / "base"
    with pytest.raises(ExportError, match=what):
        targets.keep_apart(project / out, adapter, base, recipe(project, rows))
    if out:  # as a link, or another mount, spells it
        (project / "other").symlink_to(project)
        with pytest.raises(ExportError, match=what):
            targets.keep_apart(project / "other" / out, adapter, base, recipe(project, rows))


@pytest.mark.parametrize(
    ("out", "rows"),
    [
        ("out", "rows"),
        ("rows/new", "rows/a.jsonl"),
        ("rows/new", "rows/*.jsonl"),
        ("runs/tiny/export/hf", "."),  # the run's own: wherever it lies
        ("out", "hub:owner/rows"),
    ],
)
def test_beside_them_is_its_place(project: Path, out: str, rows: str) -> None:
    targets.keep_apart(project / out, project / "runs" / "tiny" / "adapter", project / "base", recipe(project, rows))


def test_an_adapter_alone_has_no_rows(project: Path) -> None:
    targets.keep_apart(project / "rows" / "out", project / "elsewhere", project / "base", None)


@pytest.mark.parametrize("out", ["runs/tiny/export", "runs/tiny/export/hf", "runs/other/hf", "new/deep/out"])
def test_places_that_are_free(project: Path, out: str) -> None:
    targets.check_place(project / out)
    assert targets.standing(project / out, hashes=True).whose == "nobody"


def test_an_earlier_export_changed_or_not_may_make_room(project: Path) -> None:
    out = project / "out"
    disk.publish_folder(out, lambda to: (to / "a").write_text("a") and None, {"kind": "export"})
    assert targets.standing(out, hashes=True).whose == "ours"
    (out / "b").touch()
    assert targets.standing(out, hashes=True).whose == "changed"
    (project / "checkpoint").mkdir()
    disk.publish_folder(project / "checkpoint", lambda to: (to / "a").write_text("a") and None, {"kind": "checkpoint"})
    with pytest.raises(TargetTaken, match="'checkpoint'"):
        targets.standing(project / "checkpoint", hashes=True)
