"""The page is written once, or again and again while a run is under way; nothing else is written over."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from qlora import lock
from qlora.errors import RunFolderError, UserError
from qlora.report import write as writing
from qlora.report.write import watch_report, write_own, write_report
from qlora.stop import StopAsked, StopRequest
from tests.report.pages import judged
from tests.report.runs_told import end, start, step, whole, write


@pytest.fixture(autouse=True)
def short_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "WATCH_SECONDS", 0.02)


def test_a_page_lies_in_its_run_and_of_several_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = write(tmp_path / "x" / "ours", whole()), write(tmp_path / "y" / "ours", whole())
    assert write_report([one]) == one / "report.html"
    assert write_report([one / "events.jsonl"]) == one / "report.html"
    assert write_report([one, other, one]) == tmp_path / "report.html"
    text = judged((tmp_path / "report.html").read_text()).text
    assert "x/ours" in text and "y/ours" in text
    assert write_report([one], tmp_path / "other.html") == tmp_path / "other.html"
    assert sorted(path.name for path in one.iterdir()) == ["events.jsonl", "report.html"]


def test_only_pages_of_ours_are_replaced(tmp_path: Path) -> None:
    run = write(tmp_path / "run", whole())
    write_report([run])
    before = (run / "report.html").read_text()
    write(run, whole(10))
    assert write_report([run]).read_text() != before
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "link.html").symlink_to(run / "report.html")
    for name, why in (("mine.html", "no page of ours"), ("link.html", "a link"), ("none/a.html", "no such folder")):
        with pytest.raises(UserError, match=why):
            write_report([run], tmp_path / name)
    (run / "report.html").write_text("mine")
    with pytest.raises(UserError, match="no page of ours"):
        write_own(run)
    assert (run / "report.html").read_text() == "mine"


def test_a_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(write(tmp_path / "run", whole()))
    assert write_report([tmp_path / "latest"]) == tmp_path / "run" / "report.html"


def test_what_is_no_run_is_refused_and_nothing_written(tmp_path: Path) -> None:
    run = write(tmp_path / "run", whole())
    for runs, why in (([run, tmp_path / "none"], "no such folder"), ([tmp_path], "holds no events"), ([], "0 runs")):
        with pytest.raises(UserError, match=why):
            write_report(runs, tmp_path / "a.html")
    with pytest.raises(UserError, match="25 runs"):
        write_report([tmp_path / str(number) for number in range(25)])
    assert not (tmp_path / "a.html").exists()


def test_a_watch_follows_a_run_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    held = lock.acquire(run / ".lock")  # a run that has only just begun: no events yet
    found: list[Path] = []
    watcher = threading.Thread(target=lambda: found.append(watch_report([run], StopRequest())))
    watcher.start()
    write(run, [start(), step(1)])
    page = run / "report.html"
    _until(lambda: page.exists() and "under way at step 1" in page.read_text())
    assert "refresh" in page.read_text()
    with (run / "events.jsonl").open("a") as file:
        file.write(step(2) + step(3)[:50])
        file.flush()
        _until(lambda: "under way at step 2" in page.read_text())
        file.write(step(3)[50:] + end(6, 3))
    assert not found
    held.release()
    watcher.join(20)
    assert found == [page] and "refresh" not in page.read_text() and "finished" in judged(page.read_text()).text


def test_a_watch_that_is_stopped_leaves_a_page_that_stands_still(tmp_path: Path) -> None:
    run, stop = write(tmp_path, [start(), step(1)]), StopRequest()
    held = lock.acquire(run / ".lock")
    stop.set()
    with pytest.raises(StopAsked):
        watch_report([run], stop)
    held.release()
    assert "refresh" not in (run / "report.html").read_text()


def test_a_watch_of_a_run_that_is_over_is_one_page(tmp_path: Path) -> None:
    assert watch_report([write(tmp_path, whole())], StopRequest()).exists()
    with pytest.raises(RunFolderError, match="holds no events"):
        (tmp_path / "none").mkdir()
        watch_report([tmp_path / "none"], StopRequest())


def _until(seen: object) -> None:
    for _ in range(1_000):
        if seen():  # type: ignore[operator]
            return
        time.sleep(0.02)
    raise AssertionError("it was never seen")


def test_a_reader_sees_the_old_page_or_the_new_one(tmp_path: Path) -> None:
    run = write(tmp_path, whole())
    write_report([run])
    inode = os.stat(run / "report.html").st_ino
    with (run / "report.html").open() as opened:
        write_report([run])
        judged(opened.read())
    assert os.stat(run / "report.html").st_ino != inode


def test_events_that_become_a_link_while_they_are_watched_are_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [start(), step(1)])
    held, errors = lock.acquire(run / ".lock"), []

    def watch() -> None:
        try:
            watch_report([run], StopRequest())
        except RunFolderError as error:
            errors.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    page = run / "report.html"
    _until(lambda: page.exists() and "refresh" in page.read_text())
    (run / "other.jsonl").write_text(start() + step(1) + step(2))
    (tmp_path / "link").symlink_to(run / "other.jsonl")
    os.replace(tmp_path / "link", run / "events.jsonl")
    watcher.join(20)
    held.release()
    assert len(errors) == 1 and "its events cannot be read" in errors[0].what and errors[0].hint
    assert "refresh" not in page.read_text()
