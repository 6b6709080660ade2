"""`events.jsonl`: every event of a run, one JSON object a line, each step exactly once over all resumes.

The file lies where others may write: a line that is none of ours stays where it is, and is counted.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from io import BufferedWriter
from pathlib import Path
from typing import Any

from qlora import disk, files
from qlora.errors import RunFolderError
from qlora.events import EVENTS_FILE, Event, Progress
from qlora.foreign_json import ForeignFileError, ForeignModel, checked

MAX_WAITING = 10_000  # lines kept for a disk that has no room; the oldest go first
MAX_LINE_BYTES = 8 << 20  # of one event: the longest are answers with the rows that they are compared with
MAX_FILE_BYTES = 1 << 30  # what is looked through on a resume; a step's line has some 300 bytes


class _Recorded(ForeignModel):
    """What a line of ours has at least."""

    event: str
    step: int | None = None


class JsonLines:
    """A sink that appends events to a file, line by line.

    A full disk does not end a run: lines that cannot be written wait for the next event, and no half line stays.
    `foreign` are the lines of a file that was gone on with that are no events. Raises RunFolderError for a file that is
    a link, a pipe or a folder.
    """

    def __init__(self, path: Path, resume_from_step: int | None = None) -> None:
        self.path = path
        self.foreign = 0
        try:
            self._file = files.open_to_write(path, "append")
            if resume_from_step is not None:
                self.foreign = _forget_after(path, resume_from_step)
                self._file.close()
                self._file = files.open_to_write(path, "append")
        except files.UnsafePathError as error:
            raise RunFolderError(str(error), "move it away: events of the run are written there") from error
        self._written_bytes = self._file.seek(0, os.SEEK_END)
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


def utc_now() -> str:
    """The time of day as events carry it: "2026-11-25T19:02:03.123Z"."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file; lines that are none, and a last one cut short by a crash, are left out."""
    return [event for _, event in _lines(path) if event is not None]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line, or piece of a longer one, with its event; None for what is no event of ours.

    Only a line feed ends a line: a text in an event may hold a line separator of its own (U+2028).
    """
    begins = True
    with files.open_to_read(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            whole = line.endswith(b"\n")
            yield line, _event(line) if begins and whole else None
            begins = whole


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)  # not foreign_json's: a loss of ours may be NaN
        checked(_Recorded, event, EVENTS_FILE)
    except (ForeignFileError, ValueError, RecursionError):
        return None
    return dict(event)


def _forget_after(path: Path, step: int) -> int:
    """Drop what a killed process reported beyond the checkpoint: those steps will be done again.

    Returns how many lines are no events. They stay, but for one without an end, which a killed process left.
    """
    written = disk.hidden(path, "tmp")
    foreign, line, begin = 0, b"\n", 0
    try:
        with files.open_to_write(written, "new") as file, BufferedWriter(file) as kept:
            for piece, event in _lines(path):
                begin, line = kept.tell() if line.endswith(b"\n") else begin, piece
                foreign += event is None and line.endswith(b"\n")
                if event is None or not _is_of_later_step(event, step):
                    kept.write(line)
            if not line.endswith(b"\n"):
                kept.truncate(begin)  # all pieces of it
        disk.put_in_place(written, path)
    finally:
        written.unlink(missing_ok=True)
    return foreign


def _is_of_later_step(event: dict[str, Any], step: int) -> bool:
    numbered = ("step", "eval", "sample", "saved", "recovered")
    return event["event"] in numbered and (event.get("step") or 0) > step
