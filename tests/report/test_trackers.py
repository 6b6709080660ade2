"""Trackers get each step once over all resumes, no secret, and end no run. A double plays accelerate's classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import UserError
from qlora.events import Evaluated, Event, Notice, Recorder, Start, StepDone
from qlora.recipe.reading import Recipe, recipe_of_base
from qlora.report import trackers
from qlora.report.trackers import TrackerSink, check_installed, configuration

START = Start("r", "/runs/r", "base", None, "cpu", {}, None)
NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


class Tracker:
    """What a tracker of accelerate's is asked for: `kept` is what all processes have sent to its runs."""

    def __init__(self, kept: dict[str, list[Any]], run: str, fails_at: int | None) -> None:
        self.kept, self.run, self.fails_at = kept.setdefault(run, []), run, fails_at
        self.init_kwargs = {"id": run, "name": f"r-{run[:8]}"}
        self.tracker = self
        self.info = self
        self.run_id = run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.kept.append(values)

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("hf_" + "a1B2" * 9 + " refused")
        self.kept.append((step, values))

    def finish(self) -> None:
        self.kept.append("finished")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Runs of the tracker by their ids; "fails at" makes it fail there."""
    runs: dict[str, list[Any]] = {}
    asked: list[bool] = []

    def start(name: str, run_dir: Path, run: str, *, is_new: bool) -> tuple[Tracker, str]:
        asked.append(is_new)
        return Tracker(runs, run, runs["fails at"][0] if "fails at" in runs else None), "somewhere"

    monkeypatch.setattr(trackers, "start", start)
    return runs


def step(number: int) -> StepDone:
    return StepDone(number, 0.1, 2.0, 1e-3, 0.5, 100, 40, 50.0, 1 << 20, 2.0)


def told(run_dir: Path, name: str, after: int, *events: Event, recipe: Recipe | None = None) -> list[Event]:
    """A process of a run that goes on after a step; what its screen was told."""
    screen = Recorder()
    sink = TrackerSink(name, recipe or recipe_of_base("base"), run_dir, after, screen)
    for event in (START, *events):
        sink.emit(event)
    sink.close()
    return screen.events


def steps_of(kept: list[Any]) -> list[int]:
    return [one[0] for one in kept if isinstance(one, tuple) and "train/loss" in one[1]]


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_not_doubled_after_a_resume(tmp_path: Path, kept: dict[str, list[Any]], name: str) -> None:
    """Killed at step 7 with a checkpoint of step 5: steps 6 and 7 are done again, and are there already."""
    told(tmp_path, name, 0, Evaluated(0, 3.0, 20.0, None, 5, True), *map(step, range(1, 8)))
    told(tmp_path, name, 5, *map(step, range(6, 11)), Evaluated(10, 1.0, 2.7, 0.5, 5, True))
    told(tmp_path, name, 10, Evaluated(10, 1.0, 2.7, 0.5, 5, True), step(11))
    runs = [one for one in kept.values() if steps_of(one)]
    if name == "trackio":  # whose run goes by its name, and that by the beginning of the id
        assert len({run[:8] for run in kept}) == 1
    else:
        assert len(runs) == 1
    sent = [one for run in runs for one in run]
    assert steps_of(sent) == list(range(1, 12))
    assert [one[0] for one in sent if isinstance(one, tuple) and "eval/loss" in one[1]] == [0, 10]
    assert sum(isinstance(one, dict) for one in sent) == 1 and sent.count("finished") == 3


def test_a_run_that_begins_anew_with_another_recipe_is_another_run(tmp_path: Path, kept: dict[str, list[Any]]) -> None:
    told(tmp_path, "wandb", 0, step(1), step(2))
    told(tmp_path, "wandb", 0, step(1), step(2), step(3))  # nothing was saved: the same numbers again
    assert len(kept) == 1
    told(tmp_path, "wandb", 0, step(1), recipe=recipe_of_base("base", ["train.seed=7"]))
    assert [steps_of(run) for run in kept.values()] == [[1, 2, 3], [1]]


def test_one_that_fails_is_said_once_and_gets_no_more(tmp_path: Path, kept: dict[str, list[Any]]) -> None:
    kept["fails at"] = [3]
    _, notice = told(tmp_path, "mlflow", 0, *map(step, range(1, 9)))
    assert isinstance(notice, Notice) and "mlflow failed and gets no more of this run" in notice.message
    (run,) = [one for name, one in kept.items() if name != "fails at"]
    assert steps_of(run) == [1, 2] and "finished" not in run


def test_one_that_cannot_be_opened_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> object:
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr(trackers, "start", start)
    (notice,) = told(tmp_path, "tensorboard", 0, *map(step, range(1, 9)))
    assert "No module named" in str(notice)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "trackers").symlink_to(tmp_path)
    (notice,) = told(tmp_path / "x", "tensorboard", 0, step(1))
    assert "is a link" in str(notice)


@pytest.mark.parametrize(
    "record", ["", "\x00\xff\n", "../../x abc\ntrain 5\n", "id\ntrain 9", "id f\ntrain -1\neval x\ntrain 99\n\n"]
)
def test_a_record_that_is_not_ours_doubles_nothing(tmp_path: Path, kept: dict[str, list[Any]], record: str) -> None:
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "wandb.steps").write_text(record)
    told(tmp_path, "wandb", 4, step(5), step(6))
    assert all(run.isalnum() for run in kept) and len(kept) == 1
    assert [steps_of(run) for run in kept.values()] == [[] if "99" in record else [5, 6]]


def test_what_is_sent_holds_no_secret_and_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "local-0123456789abcdef")
    base = "/home/alice/local-0123456789abcdef/hf_" + "a1B2" * 9
    values = configuration(recipe_of_base(base, ["train.seed=7", "model.template_kwargs={a = true}"]))
    text = json.dumps(values)
    assert "alice" not in text and "a1B2" not in text and "0123456789" not in text
    assert values["train.seed"] == 7 and values["model.template_kwargs.a"] is True and values["data.packing"] is True
    assert all(isinstance(value, str | int | float) for value in values.values())


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_installed_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    check_installed(("console", "jsonl", "html"))
    with pytest.raises(UserError, match=f"report.sinks: the tracker {name} is not installed") as refused:
        check_installed(("console", name))
    assert refused.value.hint.startswith(f"pip install {name}")
    monkeypatch.setattr(trackers, "_is_installed", lambda package: package == name)
    check_installed((name,))


def test_a_folder_of_that_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves a folder `wandb` where it has run, which Python would import."""
    (tmp_path / "no-such-package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not trackers._is_installed("no-such-package") and trackers._is_installed("pytest")
