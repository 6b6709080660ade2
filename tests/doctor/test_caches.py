"""What is listed and what is cleared: only what is surely ours, never through a link, never what is in use."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from qlora import disk, lock
from qlora.doctor import caches
from qlora.doctor.caches import CLEARED, Kept, Places
from qlora.run_record import LOCK_FILE, RUN_FILE
from tests.doctor.cases import KEY, published


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places(*(tmp_path / name for name in ("cache", "hub", "runs", "tmp")))
    for folder in (found.cache, found.hub, found.runs, found.temporary):
        assert folder is not None
        folder.mkdir()
    return found


def run(folder: Path, recorded: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    record = {"made_by": "qlora", "kind": "run", "version": "1", "id": "a", "folder": str(recorded or folder)}
    (folder / RUN_FILE).write_text(json.dumps(record))
    (folder / "adapter").mkdir()
    return folder


def found(places: Places) -> dict[str, Kept]:
    return {one.path.name: one for one in caches.listed(places)}


def gone(places: Places, *kinds: str) -> set[str]:
    return {entry.path.name for entry, why in caches.clear(caches.listed(places), kinds or CLEARED) if not why}


def test_nothing_is_there_and_nothing_goes(places: Places, tmp_path: Path) -> None:
    assert set(found(places)) == {"hub"} and not gone(places)
    nowhere = Places(*(tmp_path / "no" / name for name in "abcd"))
    assert caches.listed(nowhere) == []


def test_what_is_ours_is_listed_with_its_size_and_goes_by_its_kind(places: Places) -> None:
    tokens = published(places.cache / "tokens" / KEY, "tokens")
    (places.cache / "crashes").mkdir()
    report = places.cache / "crashes" / "crash-77.txt"
    report.write_text("trace")
    (places.cache / "memory-calibration.json").write_text("[]")
    listed = found(places)
    assert (listed[KEY].kind, listed[KEY].stays) == ("tokens", "") and listed[KEY].bytes > 100
    assert listed["crash-77.txt"].bytes == 5 and listed["memory-calibration.json"].stays
    assert gone(places, "reports") == {"crash-77.txt"} and tokens.is_dir()
    assert gone(places) == {KEY} and not tokens.exists()
    assert (places.cache / "memory-calibration.json").exists() and places.hub is not None and places.hub.is_dir()


def test_what_is_not_ours_stays(places: Places, tmp_path: Path) -> None:
    """A folder of somebody's under a name like ours, one that was changed, links, files beside them."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    entries = places.cache / "tokens"
    changed = published(entries / KEY, "tokens", change=True)
    (entries / ("f" * 32)).mkdir()
    (entries / ("f" * 32) / "own.txt").write_text("x")
    (entries / ("e" * 32)).symlink_to(mine)
    (entries / "notes").mkdir()
    published(entries / ("d" * 32), "export")
    (places.cache / "crashes").symlink_to(mine)
    (mine / "crash-1.txt").write_text("x")
    assert not gone(places)
    assert changed.is_dir() and {path.name for path in mine.iterdir()} == {"thesis.txt", "crash-1.txt"}
    assert "it is a link" in found(places)["e" * 32].stays and "changed" in found(places)[KEY].stays


def test_nothing_of_another_users_goes(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = published(places.cache / "tokens" / KEY, "tokens")
    monkeypatch.setattr(caches.os, "geteuid", lambda: os.lstat(tokens).st_uid + 1, raising=False)
    assert found(places)[KEY].stays == "it is another user's" and not gone(places) and tokens.is_dir()


def test_what_became_a_link_since_it_was_listed_stays(places: Places, tmp_path: Path) -> None:
    tokens = published(places.cache / "tokens" / KEY, "tokens")
    listed = caches.listed(places)
    tokens.rename(tmp_path / "elsewhere")
    tokens.symlink_to(tmp_path / "elsewhere")
    ((_, why),) = caches.clear(listed, ("tokens",))
    assert "link" in why and (tmp_path / "elsewhere" / "x.bin").exists()


def test_what_lies_behind_a_link_by_now_stays(places: Places, tmp_path: Path) -> None:
    reports, mine = places.cache / "crashes", tmp_path / "mine"
    for folder in (reports, mine):
        folder.mkdir()
        (folder / "crash-1.txt").write_text("x")
    listed = caches.listed(places)
    reports.rename(tmp_path / "away")
    reports.symlink_to(mine)
    ((_, why),) = caches.clear(listed, ("reports",))
    assert "link" in why and (mine / "crash-1.txt").exists()


def test_runs_that_were_set_aside_go_and_a_run_called_v1_2_stays(places: Places) -> None:
    real = run(places.runs / "v1.2")
    run(places.runs / "v1")
    aside = run(places.runs / "v1.3", recorded=places.runs / "v1")
    somebodys = places.runs / "v1.4"
    somebodys.mkdir()
    assert found(places)["v1.3"].said == "a run that a fresh start set aside"
    assert gone(places) == {"v1.3"} and real.is_dir() and somebodys.is_dir() and not aside.exists()


def test_a_run_under_way_stays(places: Places) -> None:
    aside = run(places.runs / "v1.1", recorded=places.runs / "v1")
    held = lock.acquire(aside / LOCK_FILE)
    assert "works in it" in found(places)["v1.1"].stays and not gone(places)
    held.release()
    assert gone(places) == {"v1.1"}


def test_what_was_set_aside_inside_of_a_run(places: Places) -> None:
    here = run(places.runs / "a")
    published(here / "adapter.1", "adapter", change=True)
    published(here / "checkpoints" / "step-000010", "checkpoint")
    broken = published(here / "checkpoints" / "step-000020.broken1", "checkpoint", change=True)
    (broken / disk.MANIFEST).write_text("{")  # which is what made it a broken one
    published(here / "export" / "hf", "export")
    published(here / "export" / "hf.1", "export", change=True)
    published(here / "export" / "q4.5", "export")  # a name that the user gave: no q4 stands beside it
    (here / "events.jsonl").write_text("")
    (here / "events.jsonl.1").write_text("{}")
    (here / "adapter.old").mkdir()
    assert gone(places) == {"adapter.1", "step-000020.broken1", "hf.1", "events.jsonl.1"}
    left = {path.name for folder in (here, here / "checkpoints", here / "export") for path in folder.iterdir()}
    assert {"adapter", "adapter.old", "step-000010", "hf", "q4.5", "events.jsonl"} <= left


def test_unfinished_work_goes_once_its_process_is_gone(places: Places) -> None:
    running = places.runs / f".a.tmp-qlora-{os.getpid()}-0123abcd"
    dead = places.runs / ".a.tmp-qlora-4194399-0123abcd"  # above the highest number that Linux gives by itself
    for folder in (running, dead):
        folder.mkdir()
    (places.runs / ".notes.tmp-1").mkdir()
    new, old, foreign = (places.temporary / name for name in ("qlora-prove-abcdef12", "qlora-rows-abcdef12", "qlora-x"))
    for folder in (new, old, foreign):
        folder.mkdir(mode=0o700)
    past = time.time() - 2 * caches.OLD_SECONDS
    os.utime(old, (past, past))
    os.utime(foreign, (past, past))
    assert gone(places) == {dead.name, old.name}
    assert running.is_dir() and new.is_dir() and foreign.is_dir()
