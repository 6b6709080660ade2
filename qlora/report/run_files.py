"""A run's folder as a page needs it: its events, and beside them its recipe, its exam and its exports.

All of them are read as a stranger's: bounded, through no link out of the folder, and what cannot be read is said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora import files, foreign_json, foreign_toml, lock
from qlora.errors import RunFolderError
from qlora.events import EVENTS_FILE
from qlora.foreign_json import ForeignFileError
from qlora.report.files import MAX_LINE_BYTES
from qlora.report.run_events import Exam, ExportNote, FidelityEntry
from qlora.report.run_log import RunLog, clipped

MAX_READ_BYTES = 1 << 29  # of a file of events; beyond it, its beginning and its end: 1.7 million steps are more
HEAD_BYTES = 1 << 24
RECIPE_FILE, LOCK_FILE = "recipe.toml", ".lock"
_EXAM_FILE, _EXPORTS, _EXPORT_FILE = "study/exam.json", "export", "export.json"
_MAX_EXPORTS = 50
_MAX_KEYS = 1_000
_HINT = "name a run's folder, such as runs/quickstart: its events.jsonl is what the page is made of"
# An absolute path inside a text; the group is what stands before its last part.
_PLACE = re.compile(r"""(?<![\w.:/\\~])((?:~?/|[A-Za-z]:[\\/])(?:[^\s"'<>|:;,()\\/]+[\\/])+)(?=[^\s"'<>|:;,()\\/])""")


class EventsFile:
    """The events of a file that may still grow: `read` takes what is new, `log` is what they say.

    A line without an end waits for it. A file that was replaced or has become shorter, as a resume makes it, is read
    anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.log = RunLog()
        self.ends_within_a_line = False
        self.skipped_bytes = 0
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def read(self) -> bool:
        """Whether there was anything new. Raises OSError and UnsafePathError as `files.open_to_read`."""
        with files.open_to_read(self.path) as file:
            status = os.fstat(file.fileno())
            identity, end = (status.st_dev, status.st_ino), status.st_size
            if identity != self._identity or end < self._offset:
                self._begin_anew()
                self._identity = identity
            elif end == self._offset:
                return False
            start = self._offset
            if end - start <= MAX_READ_BYTES:
                self._lines(file, end)
            else:
                self._lines(file, start + HEAD_BYTES)
                tail = max(self._offset, end - MAX_READ_BYTES)  # a file little over the limit is read whole
                if tail > self._offset:
                    self.skipped_bytes += tail - self._offset
                    file.seek(tail)
                    file.readline(MAX_LINE_BYTES)  # the end of a line
                    self._offset = file.tell()
                self._lines(file, end)
            return self._offset > start or self.ends_within_a_line

    def _lines(self, file: Any, end: int) -> None:
        """Lines that begin before `end`; a line of many pieces is none of ours."""
        file.seek(self._offset)
        begins, self.ends_within_a_line = True, False
        while self._offset < end and (line := file.readline(MAX_LINE_BYTES)):
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                self.ends_within_a_line = True
                return
            if begins and line.endswith(b"\n"):
                self.log.feed(line)
            elif begins:
                self.log.foreign += 1
            begins = line.endswith(b"\n")
            self._offset += len(line)


@dataclass
class Run:
    """A run as a page shows it. `notes` say what of its folder could not be read."""

    name: str
    events: EventsFile
    recipe: Mapping[str, str] = field(default_factory=dict)
    exam: Exam | None = None
    fidelity: list[FidelityEntry] = field(default_factory=list)
    under_way: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def log(self) -> RunLog:
        return self.events.log


@contextmanager
def reading(run: Path) -> Iterator[None]:
    """While the events of `run` are read: what stands in the way becomes RunFolderError, with what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunFolderError(f"{run}: holds no {EVENTS_FILE}", _HINT) from error
    except files.UnsafePathError as error:
        raise RunFolderError(f"{run}: its events cannot be read ({error})", _HINT) from error
    except OSError as error:
        what = f"{run}: its events cannot be read ({error.strerror or error})"
        raise RunFolderError(what, "give yourself the right to read there, or copy the run's folder") from error


def events_of(run: Path) -> EventsFile:
    """The events of a run's folder, or of such a file itself, read so far. Raises RunFolderError with what to do."""
    with reading(run):
        if run.is_dir():
            found = EventsFile(files.inside(run, EVENTS_FILE))
        elif run.exists():
            found = EventsFile(run)
        else:
            raise RunFolderError(f"{run}: no such folder", _HINT)
        found.read()
    log = found.log
    if not (log.started or log.steps.number or log.told or log.evaluations or log.ended):
        later = f", {sum(log.unknown.values()):,} of kinds that this version does not know" if log.unknown else ""
        what = f"{found.path}: holds no event of a run ({log.foreign:,} lines that are none{later})"
        raise RunFolderError(what, "train the run to its first step, or name another one" if not later else _HINT)
    return found


def run_of(folder: Path, name: str, events: EventsFile, under_way: bool | None = None) -> Run:
    """The run of those events with what lies beside them; `under_way` is None where it is to be found out.

    Beside a file of events that was named itself, nothing is read.
    """
    events.log.steps.settle()
    run = Run(name, events)
    if not folder.is_dir():
        return run
    run.under_way = is_under_way(folder) if under_way is None else under_way
    run.recipe = _recipe(folder, run.notes)
    run.exam = _exam(folder, run.notes) or events.log.exam
    run.fidelity = _fidelity(folder, run)
    return run


def is_under_way(folder: Path) -> bool:
    """Whether a process has the run's lock at this moment."""
    holder = lock.holder_of(folder / LOCK_FILE)
    if holder is None or not holder.runs:
        return False
    try:  # not before: whoever looks at a free lock has it for a moment
        lock.check_free(folder / LOCK_FILE)
    except lock.LockHeld:
        return True
    except (OSError, files.UnsafePathError):
        return False
    return False


def without_places(text: str) -> str:
    """The text without the folders of absolute paths in it: a page may be sent on, and they hold the name of a user."""
    return _PLACE.sub("…/", text)


def _recipe(folder: Path, notes: list[str]) -> dict[str, str]:
    """`table.key` and value, as TOML would show it, of the recipe that the run recorded."""
    try:
        table = foreign_toml.parse(foreign_toml.read_text(files.inside(folder, RECIPE_FILE)))
    except FileNotFoundError:
        return {}
    except (foreign_toml.ForeignTomlError, files.UnsafePathError) as error:
        notes.append(f"{RECIPE_FILE}: {error}")
        return {}
    return flattened(table)


def flattened(table: Mapping[str, Any]) -> dict[str, str]:
    """The values of a recipe's tables by `table.key`, as JSON without quotation marks around paths; no folders."""
    values: dict[str, str] = {}
    _flatten(table, "", values)
    return values


def _flatten(value: Any, key: str, values: dict[str, str]) -> None:
    if len(values) >= _MAX_KEYS:
        return
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            _flatten(item, f"{key}.{name}" if key else name, values)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            _flatten(item, f"{key}.{number}", values)
    else:
        is_plain = isinstance(value, str | int | float | bool | list | dict)
        shown = json.dumps(value, ensure_ascii=False, default=str) if is_plain else str(value)
        values[clipped(key, 200)] = without_places(shown if "/" not in shown else re.sub(r'^"(.*)"$', r"\1", shown))


def _exam(folder: Path, notes: list[str]) -> Exam | None:
    file = folder / _EXAM_FILE
    try:
        if not os.path.lexists(file):
            return None
        real = files.inside(folder, _EXAM_FILE)
        return foreign_json.checked(Exam, foreign_json.load(real, shown=Path(_EXAM_FILE)), _EXAM_FILE)
    except (ForeignFileError, files.UnsafePathError) as error:
        notes.append(str(error))
        return None


def _fidelity(folder: Path, run: Run) -> list[FidelityEntry]:
    """Each measured model once; what a folder of an export says is newer than the events."""
    entries = {entry.name: entry for entry in (run.log.fidelity.entries if run.log.fidelity else [])}
    try:
        exports = sorted(path.name for path in (folder / _EXPORTS).iterdir())
    except OSError:
        exports = []
    for name in [name for name in exports if not name.startswith(".")][:_MAX_EXPORTS]:
        shown = f"{_EXPORTS}/{name}/{_EXPORT_FILE}"
        try:
            if os.path.lexists(folder / shown):
                real = files.inside(folder, shown)
                note = foreign_json.checked(ExportNote, foreign_json.load(real, shown=Path(shown)), shown)
                entries.update({entry.name: entry for entry in note.fidelity})
        except (ForeignFileError, files.UnsafePathError) as error:
            run.notes.append(str(error))
    return list(entries.values())
