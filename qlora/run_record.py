"""What a run's folder says of itself: that it is one, which, and where it lay when its recipe was written.

A project may be moved or renamed as a whole: paths that a run recorded are found again from where its folder is now.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Literal

from qlora import files, foreign_json
from qlora.events import EVENTS_FILE

RECIPE_FILE = "recipe.toml"
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
RESULTS = {"adapter", "checkpoints", "export", "study"}  # what a run leaves once it has worked
HEADING = "# written by qlora "
_START_LINE = b'{"event": "start"'  # how a line of events.jsonl with a Start event begins
_MAX_START_BYTES = 1 << 20  # of that line
_MAX_NAME_BYTES = 200  # file systems take 255, and names of ours are made of it
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


class RunRecord(foreign_json.ForeignModel):
    """`run.json`: that the folder is a run's, which, and where it lay when its recipe was written down."""

    made_by: Literal["qlora"]
    kind: Literal["run"]
    version: str
    id: str
    folder: str


class _Started(foreign_json.ForeignModel):
    run_dir: str


def not_a_name(name: str) -> str | None:
    """Why `name` is no plain part of a path on every system, or None."""
    if not name.strip(" ."):
        return "nothing is left of it without dots and spaces"
    if any(letter in "/\\\0" or ord(letter) < 32 for letter in name):
        return "it holds a separator or a control character"
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        return f"it has more than {_MAX_NAME_BYTES} bytes"
    if name.partition(".")[0].strip().lower() in _DEVICES:
        return "Windows calls a device so"
    return None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it says so in run.json, or in what versions up to 0.5 left (recipe and events)."""
    try:
        record_of(folder)
        return True
    except foreign_json.ForeignFileError:
        pass
    recipe, events = folder / RECIPE_FILE, folder / EVENTS_FILE
    beside = any((folder / name).exists() for name in (LOCK_FILE, *RESULTS))  # a recipe alone may be somebody's copy
    return (_begins_with(recipe, HEADING.encode()) and beside) or _begins_with(events, _START_LINE)


def _begins_with(file: Path, start: bytes) -> bool:
    try:
        with files.open_to_read(file) as opened:
            return opened.read(len(start)) == start
    except (OSError, files.UnsafePathError):
        return False


def record_of(run_dir: Path) -> RunRecord:
    """What run.json says. Raises ForeignFileError where there is none, or none of ours."""
    file = run_dir / RUN_FILE
    return foreign_json.checked(RunRecord, foreign_json.load(file), str(file))


def id_of(run_dir: Path) -> str | None:
    """The run's id; None for a run of a version up to 0.5."""
    try:
        return record_of(run_dir).id
    except foreign_json.ForeignFileError:
        return None


def has_id(run_dir: Path, run: str) -> bool:
    """Whether a folder is that run's; also where its record is there and cannot be read at this moment."""
    return os.path.lexists(run_dir / RUN_FILE) and id_of(run_dir) in (run, None)


def relocated(path: str, run_dir: Path) -> str:
    """Where a path that the run in `run_dir` recorded lies today: a project may have been moved or renamed as a whole.

    `path` is absolute: a folder, a file or a glob. What exists under it stays; else the same place seen from the run's
    folder is taken, if something is there. Everything else, hub names too, comes back as it is.
    """
    if not os.path.isabs(path) or _is_there(path):
        return path
    before = recorded_folder(run_dir)
    if before is None or before == run_dir:
        return path
    try:
        shared = os.path.commonpath((before, path))
        now = os.path.normpath(run_dir / os.path.relpath(path, before))
    except ValueError:  # on Windows: of two drives
        return path
    return now if shared != os.path.dirname(shared) and _is_there(now) else path


def recorded_folder(run_dir: Path) -> Path | None:
    """Where a run's folder lay when its recipe was written: by its run.json, for older runs by its last start event."""
    try:
        folder: str | None = record_of(run_dir).folder
    except foreign_json.ForeignFileError:
        folder = _folder_of_last_start(run_dir / EVENTS_FILE)
    return Path(folder) if folder and os.path.isabs(folder) else None


def _folder_of_last_start(events: Path) -> str | None:
    last = b""
    try:
        with files.open_to_read(events) as lines:
            while line := lines.readline(_MAX_START_BYTES):
                if line.startswith(_START_LINE):
                    last = line
        return foreign_json.checked(_Started, foreign_json.parse(last, str(events)), str(events)).run_dir
    except (OSError, ValueError):  # both of our own modules' errors are ValueErrors
        return None


def _is_there(path: str) -> bool:
    """Whether something is at a recorded path; of a glob, whether the folder is there that its pattern begins in."""
    place = path
    while glob.has_magic(place) and not os.path.lexists(place):
        place = os.path.dirname(place)
    return os.path.lexists(place) if place == path else os.path.isdir(place)
