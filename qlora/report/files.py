"""`events.jsonl`: every event of a run, one JSON object a line, each step exactly once over all resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora import disk
from qlora.events import Event, Progress


class JsonLines:
    """A sink that appends events to a file, flushed line by line."""

    def __init__(self, path: Path, resume_from_step: int | None = None) -> None:
        self.path = path
        if resume_from_step is not None and path.exists():
            _forget_after(path, resume_from_step)
        self._file = path.open("a", encoding="utf-8")

    def emit(self, event: Event) -> None:
        if not isinstance(event, Progress):
            self._file.write(json.dumps(event.as_dict(), ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of an events file; a last line cut short by a crash is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _forget_after(path: Path, step: int) -> None:
    """Drop what a killed process reported beyond the checkpoint: those steps will be done again."""
    kept = [event for event in read_events(path) if not _is_of_later_step(event, step)]
    lines = [json.dumps(event, ensure_ascii=False) for event in kept]
    disk.write_atomic(path, "\n".join(lines) + "\n" if lines else "")


def _is_of_later_step(event: dict[str, Any], step: int) -> bool:
    numbered = ("step", "eval", "sample", "saved", "recovered")
    return event.get("event") in numbered and int(event.get("step") or 0) > step
