"""events.jsonl: every event, each step once over all resumes."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora.events import Evaluated, Notice, Progress, StepDone
from qlora.report import files as report_files
from qlora.report.files import JsonLines, read_events

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


FOREIGN = (
    b"my own note\n",
    b"{}\n",
    b"[1, 2]\n",
    b"17\n",
    b'{"event": 1}\n',
    b'{"event": "step", "step": "x"}\n',
    b'{"event": "step", "step": 1e400}\n',
    b'{"event": "step", "step": [9]}\n',
    b"\x00\xff\x1b[2J\n",
    b"[" * 90_000 + b"]" * 90_000 + b"\n",
    b'{"event": "step", "step": ' + b"9" * 10_000 + b"}\n",
    b"\n",
)


def test_lines_that_are_no_events_stay_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first = JsonLines(path)
    for number in (1, 2, 3):
        first.emit(step(number))
    first.close()
    ours = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(FOREIGN[0] + ours[0] + b"".join(FOREIGN[1:]) + ours[1] + ours[2] + b'{"event": "step", "step": 2')
    lines = JsonLines(path, 2)
    lines.emit(step(3))
    lines.close()
    kept = path.read_bytes()
    assert kept.startswith(FOREIGN[0] + ours[0] + b"".join(FOREIGN[1:]) + ours[1])
    assert [event["step"] for event in read_events(path)] == [1, 2, 3]
    assert lines.foreign == len(FOREIGN)


def test_a_line_without_an_end_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_files, "MAX_LINE_BYTES", 1000)
    endless = b'{"event": "step", "step": 7' + b" " * 2500 + b"}\n"
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n' + endless + b'{"event": "step", "step": 9}\n')
    assert [event["step"] for event in read_events(path)] == [1, 9]
    JsonLines(path, resume_from_step=1).close()
    assert path.read_bytes() == b'{"event": "step", "step": 1}\n' + endless
    path.write_bytes(b'{"event": "step", "step": 1}\n' + endless[:-1])
    lines = JsonLines(path, resume_from_step=1)
    lines.emit(step(2))
    lines.close()
    assert [event["step"] for event in read_events(path)] == [1, 2]  # nothing is written behind a line without an end
