"""Nothing is written, emptied, renamed or removed through a link: what it leads to stays as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import api, disk, lock, run_folder
from qlora.cli import common
from qlora.export.hashed_file import HashedFile
from qlora.export.staging import StagedExport
from qlora.memory import calibration
from tests.attacks.world import THESIS, World, refused

pytestmark = pytest.mark.skipif(os.name == "nt", reason="making links needs rights there")


# --- in a run --------------------------------------------------------------------------------------------------------

TO_FILES = (".lock", "recipe.toml", "run.json", "events.jsonl", "my-link")
TO_FOLDERS = ("adapter", "checkpoints", "export", "tokenizer", "checkpoints/step-000001", "checkpoints/step-000009")


def link(run: Path, name: str, target: Path) -> None:
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("mode", ["new", "resume", "fresh"])
@pytest.mark.parametrize("name", [*TO_FILES, *TO_FOLDERS])
def test_a_link_in_a_run_is_refused_by_name(
    world: World, name: str, mode: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    link(world.run, name, world.thesis if name in TO_FILES else world.photos)
    if mode == "new":  # a run that has trained nothing
        for result in ("adapter", "checkpoints"):
            if not (world.run / result).is_symlink() and not name.startswith(result):
                shutil.rmtree(world.run / result, ignore_errors=True)
    before = world.snapshot()
    said = refused(lambda: api.train(world.recipe, mode=mode), capsys)
    assert world.snapshot() == before
    assert Path(name).name in said or "holds a run already" in said


@pytest.mark.parametrize("name", TO_FILES[:4])
def test_a_link_that_appears_later_is_refused_too(world: World, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Between the check and the claim a base may have been fetched: the folder is looked at again."""
    link(world.run, name, world.thesis)
    before = world.snapshot()
    refused(lambda: run_folder.claim(world.run, "resume"), capsys)
    assert world.snapshot() == before


def test_a_link_that_stays_in_its_folder_is_no_harm(world: World) -> None:
    (world.run / "latest").symlink_to("checkpoints/step-000001")
    before = world.snapshot()
    run_folder.claim(world.run, "resume").release()
    after = world.snapshot()
    assert {name: after[name] for name in before if name != "runs/tiny"} == {
        name: before[name] for name in before if name != "runs/tiny"
    }


@pytest.mark.parametrize("name", ["adapter", "recipe.toml", "export", "export/hf"])
def test_a_link_in_a_run_that_is_exported(world: World, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (world.run / "export").mkdir()
    target = Path(shutil.copytree(world.adapter, world.home / "copy")) if name == "adapter" else world.photos
    link(world.run, name, world.thesis if name == "recipe.toml" else target)
    before = world.snapshot()
    said = refused(lambda: api.merge_and_export(world.run, options=api.export_options(verify=False)), capsys)
    assert world.snapshot() == before and "is a link" in said


# --- what is written -------------------------------------------------------------------------------------------------


def empty_checkpoint(to: Path) -> None:
    (to / "a").write_text("a")


WRITES: dict[str, tuple[str, Callable[[World], object]]] = {
    "a lock": ("x", lambda world: lock.acquire(world.home / "x")),
    "a lock that is looked at": ("x", lambda world: lock.check_free(world.home / "x")),
    "a file in one rename": ("x", lambda world: disk.write_atomic(world.home / "x", "new")),
    "a file of an export": ("x", lambda world: HashedFile(world.home / "x", None).append(b"new")),  # type: ignore[arg-type]
    "a file that is gone on with": ("x", lambda world: HashedFile(world.home / "x", None).resume(3)),  # type: ignore[arg-type]
    "events": ("x", lambda world: disk.open_to_write(world.home / "x", "append")),
    "a published folder": ("x", lambda world: disk.publish_folder(world.home / "x", empty_checkpoint)),
    "above a published folder": ("x", lambda world: disk.publish_folder(world.home / "x" / "y", empty_checkpoint)),
    "a folder that is set aside": ("x", lambda world: disk.set_aside(world.home / "x", ".")),
    "a folder that is removed": ("x", lambda world: disk.discard(world.home / "x")),
    "an export": ("x", lambda world: finished(world.home / "x")),
    "an export's hidden folder": (".x.part", lambda world: finished(world.home / "x")),
}


def finished(out: Path) -> None:
    with StagedExport.open({"hf": out}, {}, 0) as staged:
        staged.append("hf", "a", b"abc")
        staged.publish("hf")


@pytest.mark.parametrize("to", ["a file", "a folder", "nothing"])
@pytest.mark.parametrize("name", WRITES)
def test_nothing_is_written_through_a_link(world: World, name: str, to: str) -> None:
    where, write = WRITES[name]
    target = {"a file": world.thesis, "a folder": world.photos, "nothing": world.home / "none"}[to]
    (world.home / where).symlink_to(target)
    before = world.snapshot()
    with pytest.raises((OSError, ValueError, api.UserError)):
        write(world)
    # What is whole already waits beside a name that somebody has taken.
    assert {name: kept for name, kept in world.snapshot().items() if not name.startswith(".x.part/")} == before | (
        {".x.part": world.snapshot()[".x.part"]} if name == "an export" else {}
    )


def test_a_published_folder_has_no_link_in_it(world: World) -> None:
    """What fills it may copy one: its target would get other rights, and be hashed as ours."""
    world.thesis.chmod(0o666)
    before = world.snapshot()

    def write(to: Path) -> None:
        (to / "thesis.txt").symlink_to(world.thesis)

    with pytest.raises(OSError, match="is a link"):
        disk.publish_folder(world.home / "x", write)
    assert world.snapshot() == before


def test_no_hidden_name_can_be_taken_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knew the name of a temporary file could lay a link there: it is a new name each time, and made anew."""
    names: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: (names.append(str(path)), real(path, *rest, **more))[1])
    for _ in range(2):
        disk.write_atomic(world.home / "x", "new")
    temporary = [name for name in names if ".x.tmp-qlora-" in name]
    assert len(set(temporary)) == 2
    monkeypatch.setattr("secrets.token_hex", lambda _: "00000000")
    (world.home / f".x.tmp-qlora-{os.getpid()}-00000000").symlink_to(world.thesis)
    with pytest.raises(FileExistsError):
        disk.write_atomic(world.home / "x", "newer")
    assert world.thesis.read_text() == THESIS and (world.home / "x").read_text() == "new"


def test_a_lock_that_is_a_second_name_of_a_file_is_none(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.run / ".lock").unlink()
    os.link(world.thesis, world.run / ".lock")
    said = refused(lambda: run_folder.claim(world.run, "resume"), capsys)
    assert "second name" in said and world.thesis.read_text() == THESIS


# --- sweeping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tmp", "swap", "old"])
def test_leftovers_that_are_links_stay(world: World, kind: str) -> None:
    (world.home / f".adapter.{kind}-qlora-1-00000000").symlink_to(world.photos)
    (world.home / f".adapter.{kind.replace('swap', 'old-swap')}-1").symlink_to(world.photos)
    before = world.snapshot()
    assert disk.sweep_leftovers(world.home) == 0 and world.snapshot() == before


def test_what_is_swept_takes_nothing_along(world: World) -> None:
    left = world.home / ".adapter.old-qlora-1-00000000"
    left.mkdir()
    (left / "photos").symlink_to(world.photos)
    (left / "thesis").symlink_to(world.thesis)
    before = world.snapshot()
    assert disk.sweep_leftovers(world.home) == 1
    gone = set(before) - set(world.snapshot())
    assert gone == {left.name, f"{left.name}/photos", f"{left.name}/thesis"}


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the folder", "the file"])
def test_a_crash_is_not_told_through_a_link(
    world: World, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = world.home / "cache"
    monkeypatch.setenv("QLORA_CACHE", str(cache))
    (cache / "crashes").mkdir(parents=True)
    if what == "the folder":
        (cache / "crashes").rmdir()
        (cache / "crashes").symlink_to(world.photos)
    else:
        (cache / "crashes" / f"crash-{os.getpid()}.txt").symlink_to(world.thesis)
    before = world.snapshot()
    with pytest.raises(SystemExit):
        common.run(lambda: 1 // 0 and None)
    assert "could not be kept" in capsys.readouterr().err and world.snapshot() == before


def test_the_calibration_of_memory_is_not_written_through_a_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(world.home / "cache"))
    (world.home / "cache").mkdir()
    world.thesis.write_text(json.dumps([]))
    (world.home / "cache" / calibration.FILE).symlink_to(world.thesis)
    before = world.snapshot()
    calibration.add(calibration.Pair("H100", "2.12", 1, 1))
    assert world.snapshot() == before


def test_tokens_are_not_cached_through_a_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the rows is known beforehand: a link of that name could lead anywhere."""
    cache = world.home / "cache"
    monkeypatch.setenv("QLORA_CACHE", str(cache))
    api.check(world.recipe)
    folders = [path.parent for path in cache.rglob(disk.MANIFEST)]
    assert folders
    for folder in folders:
        shutil.rmtree(folder)
        folder.symlink_to(world.photos)
    before = world.snapshot()
    api.check(world.recipe)  # the rows are tokenized all the same, for this time alone
    assert world.snapshot() == before
