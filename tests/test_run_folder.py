"""The folder of a run: what it records is what a resumed run uses, and what a stranger's adapter may not hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora import disk, run_folder
from qlora.errors import ExportError, RunFolderError
from qlora.foreign_json import ForeignFileError
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
    pinned = run_folder.pinned(run, ours)
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


# --- a project that was moved or renamed -----------------------------------------------------------------------------


def moved_project(tmp_path: Path, record: str) -> tuple[Path, Path]:
    """A project with a run, and the whole of it under another name; `record` says in the run where it lay."""
    old, new = tmp_path / "a" / "old", tmp_path / "b" / "deeper" / "new"
    for place in ("runs/tiny", "bases/tiny", "rows", "rows/[1]"):
        (old / place).mkdir(parents=True)
    (old / "rows" / "train.jsonl").touch()
    run = old / "runs" / "tiny"
    if record == "run.json":
        facts = {"made_by": "qlora", "kind": "run", "version": "0.5.0", "id": "0" * 32, "folder": str(run)}
        (run / "run.json").write_text(json.dumps(facts))
    else:
        lines = [{"event": "start", "run_dir": str(place)} for place in (tmp_path / "before", run)]
        events = [lines[0], {"event": "notice", "message": "a"}, lines[1], {"event": "end"}]
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    new.parent.mkdir(parents=True)
    old.rename(new)
    return old, new


@pytest.mark.parametrize("record", ["run.json", "events.jsonl"])
@pytest.mark.parametrize(
    "path", ["bases/tiny", "rows/train.jsonl", "rows/*.jsonl", "rows/[1]", "rows/**/*.jsonl", "rows"]
)
def test_a_recorded_path_is_found_where_the_project_lies_now(tmp_path: Path, path: str, record: str) -> None:
    old, new = moved_project(tmp_path, record)
    assert run_folder.relocated(str(old / path), new / "runs" / "tiny") == str(new / path)


def test_a_recorded_path_stays_where_nothing_better_is(tmp_path: Path) -> None:
    old, new = moved_project(tmp_path, "run.json")
    run = new / "runs" / "tiny"
    for gone in (
        str(old / "other"),
        "owner/name",
        "hub:owner/rows@main:train",
        "",
        "/\0",
        str(old / "none" / "*.jsonl"),
    ):
        assert run_folder.relocated(gone, run) == gone
    old.mkdir()
    (old / "rows").mkdir()  # it was copied, not moved: what was recorded is still there
    assert run_folder.relocated(str(old / "rows"), run) == str(old / "rows")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"made_by": "qlora"}', '{"folder": "runs"}', "[" * 10_000])
def test_a_broken_record_moves_nothing(tmp_path: Path, text: str) -> None:
    old, new = moved_project(tmp_path, "run.json")
    (new / "runs" / "tiny" / "run.json").write_text(text)
    (new / "runs" / "tiny" / "events.jsonl").write_text('{"event": "start"' + text + "\n")
    assert run_folder.relocated(str(old / "rows"), new / "runs" / "tiny") == str(old / "rows")


def test_versions_that_have_changed_since_a_checkpoint_was_made(tmp_path: Path) -> None:
    now = run_folder.versions()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"versions": now | {"torch": "2.1.0", "gone": "1"}}))
    assert run_folder.other_versions(tmp_path) == f"torch 2.1.0 (now {now['torch']})"
    manifest.write_text(json.dumps({"versions": now}))
    assert run_folder.other_versions(tmp_path) == ""
    for wrong in ({"torch": 2}, ["torch"], {"torch": "1" * 1000}):
        manifest.write_text(json.dumps({"versions": wrong}))
        with pytest.raises(ForeignFileError, match=r"manifest\.json: versions"):
            run_folder.made_with(tmp_path)
