"""The folder of a run: what it records is what a resumed run uses, and what a stranger's adapter may not hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora import disk, run_folder
from qlora.errors import ExportError, RunFolderError
from qlora.events import Recorder
from qlora.recipe.reading import Recipe, load_recipe

COMMIT, OTHER = "a" * 40, "b" * 40


def recipe(tmp_path: Path, revision: str = "main", rows: str = "hub:owner/rows") -> Recipe:
    file = tmp_path / "tiny.toml"
    file.write_text(
        f'[model]\nbase = "owner/base"\nrevision = "{revision}"\n[[data.train]]\npath = "{rows}"\n'
        f'[output]\ndir = "{tmp_path}"\n'
    )
    return load_recipe(file)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder that recorded the commits of base and rows."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    run_folder.write_recipe(folder, recipe(tmp_path, rows=f"hub:owner/rows@{COMMIT}:train"), COMMIT)
    return folder


@pytest.mark.parametrize(
    "rows", ["hub:owner/rows", "hub:owner/rows@main", "hub:owner/rows:train", "hub:owner/rows@v1:train"]
)
def test_a_resumed_run_uses_the_commits_that_it_recorded(tmp_path: Path, run: Path, rows: str) -> None:
    """Whatever the branch means today."""
    ours = recipe(tmp_path, rows=rows)
    run_folder.check_claim(run, ours, "resume")
    pinned = run_folder.resumed(run, ours, Recorder())
    assert pinned.model.revision == COMMIT and pinned.data.train[0].path == f"hub:owner/rows@{COMMIT}:train"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"revision": OTHER}, "model.revision"),
        ({"rows": f"hub:owner/rows@{OTHER}:train"}, "data.train"),
        ({"rows": "hub:owner/others"}, "data.train"),
        ({"rows": "hub:owner/rows:test"}, "data.train"),
    ],
)
def test_another_commit_is_another_run(tmp_path: Path, run: Path, changes: dict[str, str], key: str) -> None:
    with pytest.raises(RunFolderError, match=f"these keys differ: {key}"):
        run_folder.check_claim(run, recipe(tmp_path, **changes), "resume")


def test_free_keys_may_change(tmp_path: Path, run: Path) -> None:
    ours = recipe(tmp_path)
    free = {
        "checkpoint": ours.checkpoint.model_copy(update={"every_steps": 7, "keep": 9}),
        "report": ours.report.model_copy(update={"sinks": ("jsonl",)}),
        "export": ours.export.model_copy(update={"formats": ("hf",)}),
    }
    run_folder.check_claim(run, ours.model_copy(update=free), "resume")


def test_an_adapter_may_hold_plain_files_only(tmp_path: Path) -> None:
    """A tokenizer file that is a link would be copied into the export, with whatever it points to."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert run_folder.adapter_of(adapter)[0] == adapter
    (tmp_path / "secret").write_text("a secret")
    (adapter / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match="link out of the folder"):
        run_folder.adapter_of(adapter)
    (adapter / "tokenizer.json").unlink()
    os.mkfifo(adapter / "tokenizer.json")
    with pytest.raises(ExportError, match="neither a file nor a folder"):
        run_folder.adapter_of(adapter)


def test_what_others_write_at_this_moment_is_left_alone(tmp_path: Path) -> None:
    """The cache of tokens is shared: only what dead processes left is swept."""
    (tmp_path / f".a.tmp-{os.getpid()}").mkdir()
    (tmp_path / ".b.tmp-4194305").mkdir()  # above the largest process number of Linux
    assert disk.sweep_leftovers(tmp_path, spare_running=True) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f".a.tmp-{os.getpid()}"]
