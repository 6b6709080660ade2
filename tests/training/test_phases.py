"""Every second of a process belongs to one phase, and what takes long is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.events import Progress, Recorder
from qlora.training import phases
from qlora.training.phases import PhaseClock
from tests.runs import run_dir, train, values, write_recipe


def test_a_phase_inside_another_stops_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    clock = PhaseClock(Recorder())
    with clock.phase("training"):
        now[0] = 10.0
        with clock.phase("saving"):
            now[0] = 13.0
        now[0] = 14.0
    now[0] = 50.0  # between phases
    with pytest.raises(ValueError), clock.phase("saving"):
        now[0] = 52.0
        raise ValueError
    assert clock.seconds == {"training": 11.0, "saving": 5.0}


def test_a_task_is_drawn_for_as_long_as_it_runs() -> None:
    recorder = Recorder()
    with PhaseClock(recorder).phase("checks", "dry run"):
        assert recorder.events == [Progress("dry run", 0, 1)]
    assert recorder.events == [Progress("dry run", 0, 1), Progress("dry run", 1, 1)]


def test_the_end_says_where_the_time_went(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, "train.max_steps=2", "eval.samples=1")
    (spent,) = values(recorder, "end", "phases")
    assert set(spent) == {"rows", "checks", "load", "evaluation", "samples", "training", "saving"}
    assert all(seconds >= 0 for seconds in spent.values())
    stopped = train(recipe, "train.max_steps=3", "eval.samples=1", mode="fresh", stop_after=1)
    assert values(stopped, "end", "reason") == ["stopped"] and "training" in values(stopped, "end", "phases")[0]
    assert (run_dir(recipe) / "events.jsonl").is_file()
