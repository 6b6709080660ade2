"""What a run's folder says of itself, and where what it recorded lies today."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora import run_record

HEADING = "# written by qlora 0.5.0; every key resolved\n"
START = '{"event": "start", "time": "2026-11-25T19:02:03.123Z", "recipe": "tiny", "run_dir": "/runs/tiny"}\n'

FOLDERS: dict[str, tuple[bool, Callable[[Path], object]]] = {
    "an empty folder": (False, lambda run: None),
    "a run of version 0.5": (
        True,
        lambda run: ((run / "recipe.toml").write_text(HEADING), (run / "events.jsonl").write_text(START)),
    ),
    "a run of version 0.5 without events": (
        True,
        lambda run: ((run / "recipe.toml").write_text(HEADING), (run / ".lock").touch()),
    ),
    "events alone": (True, lambda run: (run / "events.jsonl").write_text(START)),
    "a copied recipe": (False, lambda run: (run / "recipe.toml").write_text(HEADING)),
    "a recipe of the user's": (
        False,
        lambda run: ((run / "recipe.toml").write_text("[soup]"), (run / "checkpoints").mkdir()),
    ),
    "events of another program": (False, lambda run: (run / "events.jsonl").write_text('{"event": "click"}')),
    "a record": (
        True,
        lambda run: (run / "run.json").write_text(
            json.dumps({"made_by": "qlora", "kind": "run", "version": "1", "id": "0", "folder": "/runs/tiny"})
        ),
    ),
    "a record of another program": (False, lambda run: (run / "run.json").write_text('{"made_by": "npm"}')),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_which_folders_are_runs(tmp_path: Path, name: str) -> None:
    is_one, make = FOLDERS[name]
    make(tmp_path)
    assert run_record.is_run(tmp_path) is is_one


def test_a_record_is_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "recipe.toml").write_text(HEADING)
    (tmp_path / "run" / "recipe.toml").symlink_to(tmp_path / "recipe.toml")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert not run_record.is_run(tmp_path / "run")


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
    assert run_record.relocated(str(old / path), new / "runs" / "tiny") == str(new / path)


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
        assert run_record.relocated(gone, run) == gone
    old.mkdir()
    (old / "rows").mkdir()  # it was copied, not moved: what was recorded is still there
    assert run_record.relocated(str(old / "rows"), run) == str(old / "rows")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"made_by": "qlora"}', '{"folder": "runs"}', "[" * 10_000])
def test_a_broken_record_moves_nothing(tmp_path: Path, text: str) -> None:
    old, new = moved_project(tmp_path, "run.json")
    (new / "runs" / "tiny" / "run.json").write_text(text)
    (new / "runs" / "tiny" / "events.jsonl").write_text('{"event": "start"' + text + "\n")
    assert run_record.relocated(str(old / "rows"), new / "runs" / "tiny") == str(old / "rows")
