"""`events.jsonl`: every event of a run, one JSON object a line, each step exactly once over all resumes."""

from __future__ import annotations

import json
import os
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora import disk
from qlora.events import EVENTS_FILE, Event, Progress, Sink
from qlora.recipe.sections import ReportSection

MAX_WAITING = 10_000  # lines kept for a disk that has no room; the oldest go first


class JsonLines:
    """A sink that appends events to a file, line by line.

    A full disk does not end a run: lines that cannot be written wait for the next event, and no half line stays.
    """

    def __init__(self, path: Path, resume_from_step: int | None = None) -> None:
        self.path = path
        if resume_from_step is not None and path.exists():
            _forget_after(path, resume_from_step)
        self._file = disk.open_to_write(path, "append")
        self._written_bytes = self._file.tell()
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)

    def emit(self, event: Event) -> None:
        if not isinstance(event, Progress):
            line = {"event": event.kind, "time": utc_now(), **event.as_dict()}
            self._waiting.append(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._write()

    def close(self) -> None:
        self._write()
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            try:
                written = self._file.write(line)
            except OSError:
                return
            if written != len(line):  # the disk took a part of it
                with suppress(OSError):
                    os.truncate(self._file.fileno(), self._written_bytes)
                return
            self._written_bytes += len(line)
            self._waiting.popleft()


def open_sinks(section: ReportSection, run_dir: Path, step: int) -> list[Sink]:
    """The sinks of `[report]` that write into the run's folder; the console belongs to the command.

    `step` is the step that the run goes on after: what an earlier process reported beyond it is forgotten.
    """
    return [JsonLines(run_dir / EVENTS_FILE, step)] if "jsonl" in section.sinks else []


def utc_now() -> str:
    """The time of day as events carry it: "2026-11-25T19:02:03.123Z"."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of an events file; a last line cut short by a crash is left out."""
    found = []
    # Not splitlines(): a text in an event may hold a line separator of its own (U+2028).
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _forget_after(path: Path, step: int) -> None:
    """Drop what a killed process reported beyond the checkpoint: those steps will be done again."""
    kept = [event for event in read_events(path) if not _is_of_later_step(event, step)]
    disk.write_atomic(path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))


def _is_of_later_step(event: dict[str, Any], step: int) -> bool:
    numbered = ("step", "eval", "sample", "saved", "recovered")
    return event.get("event") in numbered and int(event.get("step") or 0) > step
