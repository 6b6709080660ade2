"""The folder of a run: what it records is what a resumed run uses, and what a stranger's adapter may not hold."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from qlora import disk, run_folder, run_record, third_party
from qlora.errors import ExportError, RunFolderError, TrainingStopped
from qlora.events import Recorder
from qlora.foreign_json import ForeignFileError
from qlora.numerics import Numerics
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
    (tmp_path / f".a.tmp-qlora-{os.getpid()}-00000000").mkdir()
    (tmp_path / ".b.tmp-qlora-4194305-00000000").mkdir()  # above the largest process number of Linux
    assert disk.sweep_leftovers(tmp_path, spare_running=True) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f".a.tmp-qlora-{os.getpid()}-00000000"]


def test_a_folder_says_that_it_is_a_run_and_which(tmp_path: Path, run: Path) -> None:
    first = run_record.record_of(run)
    assert (first.made_by, first.folder, len(first.id)) == ("qlora", str(run), 32) and run_record.is_run(run)
    moved = run.rename(tmp_path / "moved")
    run_folder.write_recipe(moved, recipe(tmp_path), None)
    again = run_record.record_of(moved)
    assert (again.id, again.folder) == (first.id, str(moved)), "it is the same run, in another place"


def test_an_adapter_of_a_run_is_told_by_the_run_and_not_by_a_recipe(tmp_path: Path, run: Path) -> None:
    """recipe.toml is a common name: beside somebody's adapter it makes no run, and is not read."""
    for folder in (run, tmp_path / "mine"):
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "mine" / "recipe.toml").write_text("[soup]")
    assert run_folder.adapter_of(run / "adapter") == (run / "adapter", run / "export")
    theirs = tmp_path / "mine" / "adapter"
    assert run_folder.adapter_of(theirs) == (theirs, tmp_path / "mine" / "adapter-export")
    assert run_folder.recipe_of(theirs, Recorder()) is None and run_folder.name_of(theirs) == "adapter"
    assert run_folder.name_of(run / "adapter") == "tiny"


# --- the folder while it trains --------------------------------------------------------------------------------------


def test_the_folder_is_there_until_it_is_another_one(tmp_path: Path, run: Path) -> None:
    held = run_folder.claim(run, "resume")
    about = run_folder.provenance(recipe(tmp_path), run)
    run_folder.check_there(run, about)
    moved = run.rename(tmp_path / "moved")
    with pytest.raises(TrainingStopped, match="moved, removed or replaced"):
        run_folder.check_there(run, about)
    run.mkdir()  # somebody's new folder of that name
    with pytest.raises(TrainingStopped):
        run_folder.check_there(run, about)
    run.rmdir()
    shutil.copytree(moved, run)  # a copy names the run and its holder, and is another folder all the same
    with pytest.raises(TrainingStopped):
        run_folder.check_there(run, about)
    shutil.rmtree(run)
    moved.rename(run)
    run_folder.check_there(run, about)
    for name in (".lock", "run.json"):  # a lock may be removed by hand, and a record be unreadable for a moment
        (run / name).unlink()
        (run / name).write_text("")
        run_folder.check_there(run, about)
    held.release()


def test_a_changed_adapter_is_kept_and_said(run: Path) -> None:
    sink = Recorder()
    write = lambda to: (to / "README.md").write_text("card") and None  # noqa: E731
    assert run_folder.publish_adapter(run, write, sink) == 4
    assert disk.read_manifest(run / "adapter")["of"] == {"run": run_record.id_of(run)}
    run_folder.publish_adapter(run, write, sink)
    assert not sink.events
    (run / "adapter" / "README.md").write_text("my own card")
    run_folder.publish_adapter(run, write, sink)
    assert (run / "adapter.1" / "README.md").read_text() == "my own card"
    (notice,) = sink.of("notice")
    assert f"it is kept as {run / 'adapter.1'} (" in notice.as_dict()["message"]


def test_where_a_path_holds_a_secret_the_record_is_its_owners(tmp_path: Path) -> None:
    run = tmp_path / "hf_ThisIsTheHubTokenOfATest0123"
    run.mkdir()
    assert run_folder.write_recipe(run, recipe(tmp_path), None)
    for name in ("recipe.toml", "run.json"):
        assert (run / name).stat().st_mode & 0o777 == 0o600
    assert not run_folder.write_recipe(tmp_path, recipe(tmp_path), None)


def test_versions_that_have_changed_since_a_checkpoint_was_made(tmp_path: Path) -> None:
    now = run_folder.versions()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"versions": now | {"torch": "2.1.0", "gone": "1"}}))
    assert run_folder.other_versions(tmp_path) == [f"torch 2.1.0 (now {now['torch']})"]
    manifest.write_text(json.dumps({"versions": now}))
    assert run_folder.other_versions(tmp_path) == []
    for wrong in ({"torch": 2}, ["torch"], {"torch": "1" * 1000}):
        manifest.write_text(json.dumps({"versions": wrong}))
        with pytest.raises(ForeignFileError, match=r"manifest\.json: versions"):
            run_folder.made_with(tmp_path)


def test_a_folder_of_rows_is_published_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    names = {
        f"{tmp_path}/rows:train": "rows",
        f"{tmp_path}/rows.jsonl": "rows.jsonl",
        f"{tmp_path}/a:b": "a:b",
        "hub:owner/rows@main:test": "owner/rows@main",
    }
    assert {path: run_folder.dataset_name(path) for path in names} == names


def test_a_start_says_how_the_allocator_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_validate({"model": {"base": "b"}})
    for name in third_party.ALLOCATORS:
        monkeypatch.delenv(name, raising=False)
    said = [run_folder.start_event(recipe, tmp_path, None, "cuda:0", Numerics(), None).allocator]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    said.append(run_folder.start_event(recipe, tmp_path, None, "cuda:0", Numerics(), None).allocator)
    assert said == [None, "expandable_segments:True"]
