"""Writes the page of runs: once, or again and again while one of them is under way in another process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qlora import disk, files
from qlora.errors import RunFolderError, UserError
from qlora.report.figures import names_of
from qlora.report.page import check_place
from qlora.report.run_files import EventsFile, events_of, is_under_way, reading, run_of
from qlora.report.run_page import MAX_RUNS, page_of
from qlora.stop import StopRequest

FILE = "report.html"  # in a run's folder, or of several runs in the current one
WATCH_SECONDS = 2.0  # between two looks at the events of a run under way: a browser asks every five
_NAP_SECONDS = 0.2  # in which a signal is seen


class Report:
    """Runs and the place of their page. Raises UserError for what is none of both; nothing is written yet."""

    def __init__(self, runs: Sequence[str | Path], out: str | Path | None = None) -> None:
        self.folders = list(dict.fromkeys(files.user_path(run, "the run") for run in runs))
        if not 0 < len(self.folders) <= MAX_RUNS:
            what = f"{len(self.folders):,} runs: a page shows 1 to {MAX_RUNS} beside each other"
            raise UserError(what, "name the folders of some runs, such as runs/quickstart")
        first = self.folders[0]
        beside = first if first.is_dir() else first.parent
        own = beside / FILE if len(self.folders) == 1 else Path(FILE)
        for folder in self.folders:  # what is no run is said before what is wrong with the place
            if not folder.exists():
                events_of(folder)
        self.place = check_place(Path(out) if out is not None else own, "`out`")
        self.names = _names(self.folders)
        self.events: list[EventsFile] = []

    @property
    def is_under_way(self) -> bool:
        """Whether one of the runs goes on at this moment."""
        return any(is_under_way(folder) for folder in self.folders)

    def read(self) -> bool:
        """Read what is new; whether anything is. Raises RunFolderError where events cannot be read, or are none."""
        if not self.events:
            self.events = [events_of(folder) for folder in self.folders]
            return True
        found = False
        for folder, events in zip(self.folders, self.events, strict=True):
            with reading(folder), suppress(FileNotFoundError):  # a run that begins anew has moved it
                found |= events.read()
        return found

    def write(self, live: bool = False) -> Path:
        """Replace the page in one rename. Raises OSError."""
        three = zip(self.folders, self.names, self.events, strict=True)
        disk.write_atomic(self.place, page_of([run_of(*one) for one in three], live))
        return self.place


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one page of one or several runs (their folders), and say where it is.

    `out` is the page's file; without it `report.html` in the folder of the run, of several runs in the current folder.
    A page of ours is replaced, and nothing else. Raises UserError for what is no run and for such a place, OSError.
    """
    report = Report(runs, out)
    report.read()
    return report.write()


def watch_report(runs: Sequence[str | Path], stop: StopRequest, out: str | Path | None = None) -> Path:
    """`write_report`, again whenever the runs have told of something, until none of them is under way any more.

    Raises StopAsked when it is asked to stop; the page stands then, and no browser opens it again by itself.
    """
    report = Report(runs, out)
    with stop.being_read():
        _wait_for_events(report, stop)
        try:
            while report.is_under_way:
                if report.read() or not report.place.exists():
                    report.write(live=True)
                _sleep(stop)
        finally:
            with suppress(RunFolderError):
                report.read()
            report.write()
    return report.place


def write_own(run_dir: Path) -> None:
    """The page of the run that this process has trained in `run_dir`. Raises UserError or OSError."""
    page, events = check_place(run_dir / FILE), events_of(run_dir)
    disk.write_atomic(page, page_of([run_of(run_dir, run_dir.name, events, under_way=False)]))


def _wait_for_events(report: Report, stop: StopRequest) -> None:
    """A run that has only just begun has told of nothing yet."""
    while True:
        try:
            report.read()
            report.write(live=report.is_under_way)
            return
        except RunFolderError:
            if not report.is_under_way:
                raise
        _sleep(stop)


def _sleep(stop: StopRequest) -> None:
    until = time.monotonic() + WATCH_SECONDS
    while (left := until - time.monotonic()) > 0:
        stop.check()
        time.sleep(min(left, _NAP_SECONDS))


def _names(folders: Sequence[Path]) -> list[str]:
    """What the runs are called: the shortest ends of their paths that tell them apart."""
    return names_of([str(folder if folder.is_dir() or not folder.exists() else folder.parent) for folder in folders])
