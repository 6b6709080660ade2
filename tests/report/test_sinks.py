"""The sinks that a recipe names: what they write, and that none of them ends a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import pytest

from qlora import api
from qlora.errors import RunFolderError, UserError
from qlora.events import End, Notice, Recorder, Start
from qlora.recipe.reading import Recipe, load_recipe, recipe_of_base
from qlora.report import trackers
from qlora.report import write as writing
from qlora.report.sinks import open_sinks
from tests.report.pages import judged
from tests.runs import run_dir, train, write_recipe

START = Start("r", "/runs/r", "base", None, "cpu", {}, None)


def recipe(*sinks: str) -> Recipe:
    return recipe_of_base("base", [f"report.sinks={list(sinks)}"] if sinks else [])


@pytest.mark.parametrize(
    ("sinks", "files"),
    [(("console", "jsonl"), ["events.jsonl"]), (("console",), []), ((), ["events.jsonl", "report.html"])],
)
def test_the_recipe_names_what_is_written(tmp_path: Path, sinks: tuple[str, ...], files: list[str]) -> None:
    for sink in open_sinks(recipe(*sinks), tmp_path, 0, Recorder()):
        sink.emit(START)
        sink.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_the_page_is_made_of_all_events_when_the_run_is_over(tmp_path: Path) -> None:
    lines, page = open_sinks(recipe(), tmp_path, 0, Recorder())
    for event in (START, End("early stopping", 1, 2, 3.0, 4, 5, None, None, None, None, 6, None, None)):
        for sink in (lines, page):
            sink.emit(event)
    lines.close()
    page.close()
    assert "early stopping" in judged((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize("trouble", ["file", "link", "full", "fault", "no events"])
def test_a_page_that_cannot_be_written_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def failing(*_: object) -> str:
        raise OSError(28, "No space left on device") if trouble == "full" else ZeroDivisionError("ours")

    screen, page = Recorder(), tmp_path / "report.html"
    (tmp_path / "mine").write_text("mine")
    if trouble == "file":
        page.write_text("mine")
    elif trouble == "link":
        page.symlink_to(tmp_path / "mine")
    elif trouble != "no events":
        monkeypatch.setattr(
            writing.disk if trouble == "full" else writing, "write_atomic" if trouble == "full" else "page_of", failing
        )
    for sink in open_sinks(recipe(*(["html"] if trouble == "no events" else [])), tmp_path, 0, screen):
        sink.emit(START)
        sink.close()
    (notice,) = screen.events
    assert isinstance(notice, Notice) and "report.html was not written" in notice.message
    assert (tmp_path / "mine").read_text() == "mine" and (trouble != "file" or page.read_text() == "mine")


def test_a_tracker_that_is_missing_is_refused_before_a_run_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    recipe = load_recipe(write_recipe(tmp_path, tmp_path / "no base"), ['report.sinks=["trackio"]'])
    for work in (lambda: api.train(recipe, name="tiny"), lambda: api.check(recipe)):
        with pytest.raises(UserError, match=r"report\.sinks: the tracker trackio is not installed"):
            work()
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_and_went_on_has_one_page_and_one_tracked_run(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    class Tracker:
        init_kwargs: ClassVar[dict[str, str]] = {"id": "abc"}

        def store_init_configuration(self, values: dict[str, object]) -> None:
            assert values["train.max_steps"] == 3

        def log(self, values: dict[str, float], step: int) -> None:
            sent.extend([step] if "train/loss" in values else [])

        def finish(self) -> None:
            raise ConnectionError("gone")

    monkeypatch.setattr(trackers, "start", lambda *_, **__: (Tracker(), "here"))
    monkeypatch.setattr(trackers, "_is_installed", lambda package: True)
    file = write_recipe(tmp_path, llama)
    keys = ("train.max_steps=3", "train.batch_size=2", "data.max_length=96", "eval.samples=1")
    keys = (*keys, 'report.sinks=["jsonl", "wandb", "html"]')
    train(file, *keys, stop_after=2)
    page = run_dir(file) / "report.html"
    assert "stopped" in judged(page.read_text()).text
    said = train(file, *keys, mode="resume")
    text = judged(page.read_text()).text
    assert "went on after step 2" in text and "of 3 steps" in text and "Answers, untuned and tuned" in text
    assert sent == [1, 2, 3] and sum("wandb failed" in str(notice) for notice in said.of("notice")) == 1


def test_lines_that_are_no_events_are_counted(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("mine\n{}\n")
    screen = Recorder()
    open_sinks(recipe("jsonl"), tmp_path, 2, screen)[0].close()
    (notice,) = screen.events
    assert isinstance(notice, Notice) and notice.count == 2
    assert notice.message == "2 lines of events.jsonl are no events of a run, and stay as they are"


def test_a_file_beyond_all_events_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # takes no room
    screen = Recorder()
    (lines,) = open_sinks(recipe("jsonl"), tmp_path, 2, screen)
    lines.close()
    assert path.stat().st_size == 0 and (tmp_path / "events.jsonl.1").stat().st_size == 2 << 30
    assert "it is kept as events.jsonl.1" in repr(screen.events)


def test_events_are_written_through_no_link(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine\n")
    for name, make in (("link", os.symlink), ("hard", os.link)):
        run = tmp_path / name
        run.mkdir()
        make(thesis, run / "events.jsonl")
        with pytest.raises(RunFolderError, match=r"events\.jsonl is a"):
            open_sinks(recipe("jsonl"), run, 0, Recorder())
    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(RunFolderError, match="not a regular file"):
        open_sinks(recipe("jsonl"), tmp_path, 0, Recorder())
    assert thesis.read_text() == "mine\n" and {path.name for path in (tmp_path / "hard").iterdir()} == {"events.jsonl"}
