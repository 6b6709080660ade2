"""events.jsonl: every event, each step once over all resumes."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora.events import Evaluated, Notice, Progress, Recorder, StepDone
from qlora.recipe.sections import ReportSection
from qlora.report.files import JsonLines, open_sinks, read_events

STEP = StepDone(1, 0.1, 2.0, 1e-3, 0.5, 100, 40, 50.0, 1 << 20, 2.0)


def step(number: int) -> StepDone:
    return dataclasses.replace(STEP, step=number)


def test_events_are_json_and_progress_is_not_kept(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "events.jsonl")
    for event in (Notice("packing", "switched off — „why“"), Progress("load", 1, 2), step(1)):
        sink.emit(event)
    sink.close()
    events = read_events(tmp_path / "events.jsonl")
    assert [event["event"] for event in events] == ["notice", "step"]
    assert set(events[1]) == {"event", "time", *(field.name for field in dataclasses.fields(StepDone))}


def test_each_event_has_the_time_of_day(tmp_path: Path) -> None:
    """UTC with milliseconds, and kept when a resumed run drops what came after its checkpoint."""
    path = tmp_path / "events.jsonl"
    before = datetime.now(UTC)
    sink = JsonLines(path)
    sink.emit(Notice("packing", "on"))
    sink.close()
    JsonLines(path, resume_from_step=1).close()
    (event,) = read_events(path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
    assert abs(datetime.fromisoformat(event["time"]) - before) < timedelta(minutes=1)
    assert list(event)[:2] == ["event", "time"]


def test_a_resumed_run_reports_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first = JsonLines(path)
    for number in range(1, 8):
        first.emit(step(number))
    first.emit(Evaluated(6, 1.0, 2.7, None, 10, True))
    first.close()
    with path.open("a") as file:
        file.write('{"event": "step", "st')  # the process died while it wrote
    second = JsonLines(path, resume_from_step=5)
    for number in range(6, 10):
        second.emit(step(number))
    second.close()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["step"] for event in events] == list(range(1, 10))


@pytest.mark.parametrize(("sinks", "files"), [(("console", "jsonl"), ["events.jsonl"]), (("console",), []), ((), [])])
def test_the_recipe_names_what_is_written(tmp_path: Path, sinks: tuple[str, ...], files: list[str]) -> None:
    for sink in open_sinks(ReportSection(sinks=sinks), tmp_path, 0, Recorder()):  # type: ignore[arg-type]
        sink.close()
    assert [path.name for path in tmp_path.iterdir()] == files
