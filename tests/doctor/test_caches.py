"""What is listed and what is cleared: only what is surely ours, never through a link, never what is in use."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from qlora import disk, lock
from qlora.doctor import caches
from qlora.doctor.caches import CLEARED, Kept, Places
from qlora.model import compiled
from qlora.model.base_cache import places as kept_bases
from qlora.run_record import LOCK_FILE, RUN_FILE
from tests.doctor.cases import KEY, published

TRACEBACK = 'Traceback (most recent call last):\n  File "qlora/api.py", line 1, in train\nKeyError: 1\n'


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places(*(tmp_path / name for name in ("cache", "hub", "runs", "tmp")))
    for folder in (found.cache, found.hub, found.runs, found.temporary):
        assert folder is not None
        folder.mkdir()
    return found


def run(folder: Path, recorded: Path | None = None, named: str = "a") -> Path:
    folder.mkdir(parents=True)
    record = {"made_by": "qlora", "kind": "run", "version": "1", "id": named, "folder": str(recorded or folder)}
    (folder / RUN_FILE).write_text(json.dumps(record))
    (folder / "adapter").mkdir()
    return folder


def aged(path: Path, days: float = 2.0) -> Path:
    """The same, and all in it, as it would be after some days."""
    past = time.time() - days * caches.OLD_SECONDS
    for one in (*path.rglob("*"), path):
        os.utime(one, (past, past))
    return path


def found(places: Places) -> dict[str, Kept]:
    return {one.path.name: one for one in caches.listed(places)}


def gone(places: Places, *kinds: str) -> set[str]:
    outcomes = caches.clear(places, caches.listed(places), kinds or CLEARED)
    return {entry.path.name for entry, why in outcomes if not why}


def test_nothing_is_there_and_nothing_goes(places: Places, tmp_path: Path) -> None:
    assert set(found(places)) == {"hub"} and not gone(places)
    nowhere = Places(*(tmp_path / "no" / name for name in "abcd"))
    assert caches.listed(nowhere) == []


def test_what_is_ours_is_listed_with_its_size_and_goes_by_its_kind(places: Places) -> None:
    tokens = published(places.cache / "tokens" / KEY, "tokens")
    (places.cache / "crashes").mkdir()
    report = places.cache / "crashes" / "crash-77.txt"
    report.write_text(TRACEBACK)
    (places.cache / "crashes" / "crash-78.txt").write_text("what I saw at the crash of flight 78")
    (places.cache / "memory-calibration.json").write_text("[]")
    listed = found(places)
    assert (listed[KEY].kind, listed[KEY].stays) == ("tokens", "") and listed[KEY].bytes > 100
    assert (
        listed["crash-77.txt"].bytes == len(TRACEBACK)
        and "no report" in listed["crash-78.txt"].stays
        and listed["memory-calibration.json"].stays
    )
    assert gone(places, "reports") == {"crash-77.txt"} and tokens.is_dir()
    assert gone(places) == {KEY} and not tokens.exists()
    assert (places.cache / "memory-calibration.json").exists() and places.hub is not None and places.hub.is_dir()


def test_what_the_compiler_has_made_is_listed_and_goes(places: Places, tmp_path: Path) -> None:
    """Not while somebody writes to it, nor with what somebody has put there, nor through a link."""
    folder = places.cache / caches.COMPILED
    assert caches.COMPILED == compiled.FOLDER and caches.COMPILED not in found(places)
    for name in ("ab", "fxgraph"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.py").write_bytes(b"1" * 500)
    listed = found(places)[caches.COMPILED]
    assert (listed.kind, listed.stays) == ("compiled", "a process has just written to it") and listed.bytes >= 1000
    assert gone(places, "compiled") == set()
    for one in (folder / "ab" / "x.py", folder / "fxgraph" / "x.py", folder / "ab", folder / "fxgraph", folder):
        os.utime(one, (86_400, 86_400))
    (folder / "notes.txt").write_text("mine")
    os.utime(folder / "notes.txt", (86_400, 86_400))
    assert "it holds notes.txt" in found(places)[caches.COMPILED].stays
    (folder / "notes.txt").unlink()
    os.utime(folder, (86_400, 86_400))
    assert gone(places, "tokens") == set() and gone(places, "compiled") == {caches.COMPILED} and not folder.exists()
    folder.symlink_to(tmp_path)
    assert "a link" in found(places)[caches.COMPILED].stays


def test_bases_in_4_bit_are_listed_with_their_last_use_and_go(places: Places) -> None:
    """One that a process reads stays; one that was found damaged goes with what was set aside."""
    bases = places.cache / kept_bases.FOLDER
    names = [f"{digit * 32}-nf4-double-{digit * 16}" for digit in "abc"]
    for name in names:
        folder = bases / name
        folder.parent.mkdir(exist_ok=True)
        about = {"kind": kept_bases.KIND, "base": "org/Model"}
        disk.publish_folder(folder, lambda here: (here / "x").write_bytes(b"1" * 500) and None, about)
        kept_bases.see(folder, {})
        os.utime(bases / f"{name}.seen", (86_400, 86_400))
    (bases / names[2]).rename(bases / f"{names[2]}.broken1")
    (bases / "notes").mkdir()
    with kept_bases.using(bases / names[1]):
        listed = found(places)
        assert listed[names[0]].kind == "bases" and listed[names[0]].bytes > 500 and not listed[names[0]].stays
        assert listed[names[0]].said == "org/Model in 4 bit, last used on 1970-01-02"
        assert listed[names[1]].stays == "a process reads it" and "notes" not in listed
        assert listed[f"{names[2]}.broken1"].kind == "set-aside"
        assert gone(places, "bases") == {names[0]}
    assert not (bases / f"{names[0]}.seen").exists() and (bases / names[1]).is_dir()
    (bases / names[1] / "mine.txt").write_text("x")
    assert "somebody has changed it" in found(places)[names[1]].stays
    assert gone(places) == {f"{names[2]}.broken1"} and (bases / names[1] / "mine.txt").exists()


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
    ((_, why),) = caches.clear(places, listed, ("tokens",))
    assert "link" in why and (tmp_path / "elsewhere" / "x.bin").exists()


def test_what_lies_behind_a_link_by_now_stays(places: Places, tmp_path: Path) -> None:
    reports, mine = places.cache / "crashes", tmp_path / "mine"
    for folder in (reports, mine):
        folder.mkdir()
        (folder / "crash-1.txt").write_text(TRACEBACK)
    listed = caches.listed(places)
    reports.rename(tmp_path / "away")
    reports.symlink_to(mine)
    ((_, why),) = caches.clear(places, listed, ("reports",))
    assert "link" in why and (mine / "crash-1.txt").exists()


def test_another_thing_of_the_same_name_stays(places: Places) -> None:
    published(places.cache / "tokens" / KEY, "tokens")
    listed = caches.listed(places)
    (places.cache / "tokens" / KEY).rename(places.cache / "mine")
    again = published(places.cache / "tokens" / KEY, "tokens")
    ((_, why),) = caches.clear(places, listed, ("tokens",))
    assert "another one" in why and again.is_dir()


def test_runs_that_were_set_aside_go_and_a_run_called_v1_2_stays(places: Places) -> None:
    real = run(places.runs / "v1.2", named="c")
    run(places.runs / "v1")
    aside = run(places.runs / "v1.3", recorded=places.runs / "v1", named="b")
    published(aside / "checkpoints" / "step-000010", "checkpoint")
    somebodys = places.runs / "v1.4"
    somebodys.mkdir()
    assert found(places)["v1.3"].said == "a run that a fresh start set aside"
    assert gone(places) == {"v1.3"} and real.is_dir() and somebodys.is_dir() and not aside.exists()


def test_a_run_that_is_more_than_what_was_set_aside_stays(places: Places) -> None:
    """A copy, the only one, one in which somebody has put or changed something."""
    first = places.runs / "v1"
    run(first)
    run(places.runs / "v1.1", recorded=first)
    run(places.runs / "v2.1", recorded=places.runs / "v2", named="b")
    notes = run(places.runs / "v1.2", recorded=first, named="b") / "notes.md"
    notes.write_text("what I learnt")
    beside = run(places.runs / "v1.3", recorded=first, named="b") / "checkpoints"
    published(beside / "step-000010", "checkpoint", change=True)
    assert not gone(places) and notes.exists()
    said = {name: one.stays for name, one in found(places).items() if one.kind == "set-aside"}
    assert "a copy of v1" in said["v1.1"] and "the only one" in said["v2.1"]
    assert "notes.md" in said["v1.2"] and "not as the run left it" in said["v1.3"]


def test_a_run_under_way_stays(places: Places) -> None:
    run(places.runs / "v1")
    aside = run(places.runs / "v1.1", recorded=places.runs / "v1", named="b")
    (aside / "export" / ".hf.part").mkdir(parents=True)
    for file in (aside / LOCK_FILE, aside / "export" / ".hf.part" / "lock"):
        held = lock.acquire(file)
        assert "works in it" in found(places)["v1.1"].stays and not gone(places)
        held.release()
    shutil.rmtree(aside / "export")
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
    published(here / "checkpoints" / "step-000030.broken1", "checkpoint")
    (here / "checkpoints" / "step-notes.1").mkdir()
    published(here / "adapter.2", "adapter")  # a copy that somebody made
    assert gone(places) == {"step-000020.broken1", "step-000030.broken1", "events.jsonl.1"}
    left = {path.name for folder in (here, here / "checkpoints", here / "export") for path in folder.iterdir()}
    assert {"adapter", "adapter.old", "adapter.1", "adapter.2", "step-000010", "step-notes.1", "events.jsonl"} <= left
    assert {"hf", "hf.1", "q4.5"} <= left and "changed" in found(places)["hf.1"].stays


DEAD = 4194399  # above the highest number that Linux gives by itself


def test_unfinished_work_goes_once_its_process_is_gone(places: Places) -> None:
    running = places.runs / f".step-000500.tmp-qlora-{os.getpid()}-0123abcd"  # not 000500
    dead, only = (places.runs / f".{name}.tmp-qlora-{DEAD}-0123abcd" for name in ("a", "b"))
    fresh, swapped = places.runs / f".a.old-qlora-{DEAD}-0123abcd", places.runs / f".a.swap-qlora-{DEAD}-0123abcd"
    (places.runs / "a").mkdir()
    (places.runs / "step-000500").mkdir()
    earlier = places.runs / ".adapter.tmp-1"
    for folder in (running, dead, only, swapped, earlier):
        folder.mkdir()
        aged(folder)
    fresh.mkdir()
    new, old, foreign = (places.temporary / name for name in ("qlora-prove-abcdef12", "qlora-rows-abcdef12", "qlora-x"))
    word, written = places.temporary / "qlora-rows-original1", places.temporary / "qlora-runtime-abcdef12"
    for folder in (new, old, foreign, word, written):
        folder.mkdir(mode=0o700)
        (folder / "x").write_text("x")
    for folder in (old, foreign, word, written):
        aged(folder)
    os.utime(written / "x")
    (places.temporary / "qlora-rows-abcdef13").touch(0o600)
    aged(places.temporary / "qlora-rows-abcdef13")
    assert gone(places) == {dead.name, old.name}
    assert all(folder.is_dir() for folder in (running, only, swapped, earlier, fresh, new, foreign, word, written))


def test_what_a_run_has_left_half_written_is_the_runs_to_sweep(places: Places) -> None:
    here = run(places.runs / "a")
    left = here / "checkpoints" / f".step-000020.tmp-qlora-{DEAD}-0123abcd"
    left.mkdir(parents=True)
    (here / "checkpoints" / "step-000020").mkdir()
    aged(left)
    assert "the run sweeps it" in found(places)[left.name].stays and not gone(places) and left.is_dir()
