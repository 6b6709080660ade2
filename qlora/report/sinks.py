"""The sinks that `[report]` names and that write: events.jsonl, the page that is made of it, and trackers.

The console belongs to the command. What follows events.jsonl never ends a run: what it cannot do is said once.
"""

from __future__ import annotations

from pathlib import Path

from qlora import disk
from qlora.errors import QloraError, foreign_failures
from qlora.events import EVENTS_FILE, Event, Notice, Sink
from qlora.recipe.reading import Recipe
from qlora.report.files import MAX_FILE_BYTES, JsonLines
from qlora.report.trackers import PACKAGES, TrackerSink, check_installed
from qlora.report.write import FILE, write_own


def check_sinks(recipe: Recipe) -> None:
    """Before anything long starts: whether what `[report]` names can be had. Raises UserError."""
    check_installed(recipe.report.sinks)


def open_sinks(recipe: Recipe, run_dir: Path, step: int, screen: Sink) -> list[Sink]:
    """The sinks that write into the run's folder, in the order in which they are to be told and closed.

    `step` is the step that the run goes on after: what an earlier process reported beyond it is forgotten. `screen` is
    told of what was found there and is not ours. Raises RunFolderError for a file that cannot be gone on with.
    """
    asked = recipe.report.sinks
    sinks: list[Sink] = [_events(run_dir / EVENTS_FILE, step, screen)] if "jsonl" in asked else []
    sinks += [TrackerSink(name, recipe, run_dir, step, screen) for name in PACKAGES if name in asked]
    return [*sinks, PageSink(run_dir, screen)] if "html" in asked else sinks


def _events(file: Path, step: int, screen: Sink) -> JsonLines:
    if file.is_file() and file.stat().st_size > MAX_FILE_BYTES:
        aside = disk.set_aside(file, ".")
        what = f"{EVENTS_FILE} has more than {MAX_FILE_BYTES:,} bytes: it is kept as {aside.name}, and begun anew"
        screen.emit(Notice("events", what))
    lines = JsonLines(file, step)
    if lines.foreign:
        what = f"{lines.foreign:,} lines of {EVENTS_FILE} are no events of a run, and stay as they are"
        screen.emit(Notice("events", what, lines.foreign))
    return lines


class PageSink:
    """A sink that takes nothing: the page is made of events.jsonl when the run is over, however it ended."""

    def __init__(self, run_dir: Path, screen: Sink) -> None:
        self.run_dir = run_dir
        self.screen = screen

    def emit(self, event: Event) -> None:
        """The event is in events.jsonl."""

    def close(self) -> None:
        """Write the page; where that fails, say so: the run is done all the same."""
        reason = ""
        with foreign_failures(memory_too=True) as failure:
            try:
                write_own(self.run_dir)
            except QloraError as error:
                reason = error.what
        if reason or failure.error is not None:
            said = f"{FILE} was not written ({reason or failure.reason}); qlora-report draws it from {EVENTS_FILE}"
            self.screen.emit(Notice("report", said))
