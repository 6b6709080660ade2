"""What a run's events say, read once from front to back and kept in bounded memory, whatever the file holds.

The file lies where others may write, may be under way, and may be of a later version: a line that is no event of ours
is counted and let pass, and so is an event of a kind, or with values, that this version does not know.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from qlora import foreign_json
from qlora.foreign_json import ForeignFileError
from qlora.report import run_events
from qlora.report.run_events import MAX_KEPT, MAX_STEP

MAX_STEPS = 2_000_000  # kept, 56 bytes each; 20,000 is a long run
MAX_TEXT = 4_000  # characters of a text that is shown
COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes", "at")
MAX_EXAMPLES = 3  # of the rows that a reason has left out
_MAX_EXAMPLE = 300  # characters of one
_STEP_LINE = b'{"event": "step"'
_MAX_STEP_LINE = 4_096  # bytes: one has some 300
_MAX_MARKS = 5_000  # of a kind, on the time line
NAN = float("nan")


class Mark(NamedTuple):
    """Something on the time line: seconds of work since the run began, what kind of thing, and what happened."""

    at: float
    kind: str
    text: str


class Process(NamedTuple):
    """One process of the run: seconds of work when it began, and how long nothing had run before it."""

    at: float
    step: int
    pause: float


@dataclass
class Told:
    """A notice: when it was first said, how often, and its largest count."""

    at: float
    topic: str
    message: str
    times: int = 0
    count: int | None = None


@dataclass
class Steps:
    """Numbers of the steps as the file has them, in columns; `settle` puts them in order."""

    number: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})

    def forget_after(self, step: int) -> None:
        """Steps that a resumed process does again."""
        while self.number and self.number[-1] > step:
            self.number.pop()
            for column in self.columns.values():
                column.pop()

    def settle(self) -> None:
        """In rising order, each step once: of two lines about a step the later one counts."""
        numbers = self.number
        if all(numbers[at] < numbers[at + 1] for at in range(len(numbers) - 1)):
            return
        last = {number: at for at, number in enumerate(numbers)}
        order = [last[number] for number in sorted(last)]
        self.number = array("q", (numbers[at] for at in order))
        self.columns = {name: array("d", (column[at] for at in order)) for name, column in self.columns.items()}


Of = TypeVar("Of", run_events.Preference, run_events.Rewards)


class RunLog:
    """A run, as its events tell it so far. `feed` takes the next line; the rest is there to be read."""

    def __init__(self) -> None:
        self.started: run_events.Started | None = None
        self.plan: run_events.Planned | None = None
        self.steps = Steps()
        self.evaluations: dict[int, run_events.Evaluation] = {}
        self.samples: list[run_events.Sample] = []  # of the last step that has some
        self.preferred: tuple[dict[int, run_events.Preference], ...] = ({}, {})  # of steps, of evaluations
        self.rewarded: tuple[dict[int, run_events.Rewards], ...] = ({}, {})
        self.routing: run_events.Routing | None = None  # of the last evaluation, of a mixture of experts
        self.told: dict[tuple[str, str], Told] = {}
        self.saved: Counter[str] = Counter()
        self.rejected: dict[tuple[str, str], run_events.Rejected] = {}
        self.fidelity: run_events.Fidelity | None = None
        self.exported: dict[str, run_events.Exported] = {}
        self.exam: run_events.Exam | None = None
        self.ended: run_events.Ended | None = None
        self.processes: list[Process] = []
        self.marks: list[Mark] = []
        self.at = 0.0  # seconds of work so far: pauses between processes are not among them
        self.begun = ""  # the time of day of the first event
        self.foreign = 0  # lines that are no events
        self.unknown: Counter[str] = Counter()  # kinds of a later version
        self.unreadable: Counter[str] = Counter()  # events with values that this version cannot read, by kind
        self.left_out: Counter[str] = Counter()  # what is beyond what is kept
        self.clock_went_back = 0
        self._clock: float | None = None
        self._pause = 0.0
        self._marked: Counter[str] = Counter()

    def feed(self, line: bytes) -> None:
        """The next whole line of the file."""
        event = _step_of(line)
        if event is None:
            try:
                event = foreign_json.parse_object(line, "a line")
            except ForeignFileError:
                self.foreign += 1
                return
        kind = event.get("event")
        if not isinstance(kind, str):
            self.foreign += 1
        elif kind == "step":
            self._step(event)
        elif kind not in _READERS:
            self._count(self.unknown, kind)
        else:
            model, take = _READERS[kind]
            try:
                read = foreign_json.checked(model, event, "a line")
            except ForeignFileError:
                self._count(self.unreadable, kind)
                return
            self._tick(event.get("time"), is_start=kind == "start")
            take(self, read)

    # --- one method an event -----------------------------------------------------------------------------------------

    def _step(self, event: Mapping[str, Any]) -> None:
        number, seconds = event.get("step"), event.get("seconds")
        values = [event.get(name, NAN) for name in COLUMNS[:-1]]
        is_whole = type(number) is int and 0 <= number <= MAX_STEP
        if not is_whole or any(type(value) not in (int, float) for value in values):
            self._count(self.unreadable, "step")
            return
        self._tick(event.get("time"), seconds=seconds if isinstance(seconds, float) and 0 <= seconds < 1e9 else 0.0)
        if len(self.steps.number) >= MAX_STEPS:
            self.left_out["steps"] += 1
            return
        self.steps.number.append(number or 0)
        for name, value in zip(COLUMNS, (*values, self.at), strict=True):
            self.steps.columns[name].append(_float(value))

    def _started(self, read: run_events.Started) -> None:
        done = read.resumed_from_step or 0  # a run without a checkpoint begins anew
        self.steps.forget_after(done)
        self.evaluations = {step: one for step, one in self.evaluations.items() if step <= done}
        self.preferred = tuple(_until(done, found) for found in self.preferred)
        self.rewarded = tuple(_until(done, found) for found in self.rewarded)
        pause = self._pause if self.processes else 0.0
        if len(self.processes) < MAX_KEPT:
            self.processes.append(Process(self.at, done, pause))
        else:
            self.left_out["processes"] += 1
        if read.resumed_from_step is not None:
            self._mark("resumed", f"went on after step {done:,}")
        self.started, self.ended = read, None

    def _planned(self, read: run_events.Planned) -> None:
        self.plan = read

    def _evaluated(self, read: run_events.Evaluation) -> None:
        if read.step in self.evaluations or len(self.evaluations) < MAX_STEPS // 10:
            self.evaluations[read.step] = read
        else:
            self.left_out["evaluations"] += 1
        self._mark("evaluated", f"evaluated at step {read.step:,}")

    def _was_preferred(self, read: run_events.Preference) -> None:
        self._put(self.preferred[read.evaluated], read, "preferences")

    def _was_rewarded(self, read: run_events.Rewards) -> None:
        self._put(self.rewarded[read.evaluated], read, "rewards")

    def _put(self, kept: dict[int, Of], read: Of, kind: str) -> None:
        if read.step in kept or len(kept) < MAX_STEPS // 10:
            kept[read.step] = read
        else:
            self.left_out[kind] += 1

    def _routed(self, read: run_events.Routing) -> None:
        self.routing = read

    def _sampled(self, read: run_events.Sample) -> None:
        if self.samples and self.samples[0].step != read.step:
            self.samples = []
        if len(self.samples) < MAX_KEPT // 10:
            cut = {name: clipped(getattr(read, name)) for name in ("prompt", "expected", "base", "tuned")}
            self.samples.append(read.model_copy(update=cut))

    def _noticed(self, read: run_events.Said) -> None:
        topic, message = clipped(read.topic, 100), clipped(read.message)
        if (topic, message) not in self.told and len(self.told) >= MAX_KEPT:
            self.left_out["notices"] += 1
            return
        told = self.told.setdefault((topic, message), Told(self.at, topic, message))
        told.times += 1
        told.count = read.count if told.count is None else max(told.count, read.count or 0)
        self._mark("notices", f"{topic}: {message}")

    def _was_saved(self, read: run_events.Saved) -> None:
        self._count(self.saved, read.what)
        self._mark("saved", f"saved {read.what} of step {read.step:,}")

    def _recovered(self, read: run_events.Recovered) -> None:
        self._mark("recovered", f"step {read.step:,}: {read.message}")

    def _rejected(self, read: run_events.Rejected) -> None:
        key = (clipped(read.source), clipped(read.reason))
        if key in self.rejected or len(self.rejected) < MAX_KEPT:
            examples = [clipped(one, _MAX_EXAMPLE) for one in read.examples[:MAX_EXAMPLES]]
            self.rejected[key] = read.model_copy(update={"source": key[0], "reason": key[1], "examples": examples})
        else:
            self.left_out["reasons"] += 1

    def _measured(self, read: run_events.Fidelity) -> None:
        self.fidelity = read

    def _was_exported(self, read: run_events.Exported) -> None:
        path = clipped(read.path)
        if path in self.exported or len(self.exported) < MAX_KEPT:
            base = None if read.merge_base is None else clipped(read.merge_base)
            cut = {"format": clipped(read.format, 200), "path": path, "merge_base": base}
            self.exported[path] = read.model_copy(update=cut)
        self._mark("exported", f"exported {read.format}")

    def _examined(self, read: run_events.Examined) -> None:
        self.exam = read.figures
        self._mark("examined", "asked the questions of the exam")

    def _ended(self, read: run_events.Ended) -> None:
        self.ended = read
        self._mark("ended", read.reason)

    # --- what all of them do -----------------------------------------------------------------------------------------

    def _tick(self, time: Any, *, is_start: bool = False, seconds: float = 0.0) -> None:
        """The clock goes on: by the time of day, or by a step's own `seconds` in files that have none."""
        moment = _moment(time)
        self._pause = 0.0
        if moment is None:
            self.at += seconds
            return
        gone = 0.0 if self._clock is None else moment - self._clock
        if gone < 0:
            self.clock_went_back += 1
        elif is_start:
            self._pause = gone
        else:
            self.at += gone
        self._clock, self.begun = moment, self.begun or str(time)

    def _mark(self, kind: str, text: str) -> None:
        self._marked[kind] += 1
        if self._marked[kind] <= _MAX_MARKS:
            self.marks.append(Mark(self.at, kind, clipped(text, 300)))
        else:
            self.left_out[f"marks ({kind})"] += 1

    def _count(self, counter: Counter[str], kind: str) -> None:
        kind = clipped(kind, 60)
        counter[kind if kind in counter or len(counter) < 20 else "others"] += 1


def _until(step: int, found: Mapping[int, Of]) -> dict[int, Of]:
    return {at: one for at, one in found.items() if at <= step}


_READERS: dict[str, tuple[type[run_events.Read], Callable[[RunLog, Any], None]]] = {
    "start": (run_events.Started, RunLog._started),
    "plan": (run_events.Planned, RunLog._planned),
    "eval": (run_events.Evaluation, RunLog._evaluated),
    "preference": (run_events.Preference, RunLog._was_preferred),
    "rewards": (run_events.Rewards, RunLog._was_rewarded),
    "routing": (run_events.Routing, RunLog._routed),
    "sample": (run_events.Sample, RunLog._sampled),
    "notice": (run_events.Said, RunLog._noticed),
    "saved": (run_events.Saved, RunLog._was_saved),
    "recovered": (run_events.Recovered, RunLog._recovered),
    "rejected": (run_events.Rejected, RunLog._rejected),
    "fidelity": (run_events.Fidelity, RunLog._measured),
    "exported": (run_events.Exported, RunLog._was_exported),
    "exam": (run_events.Examined, RunLog._examined),
    "end": (run_events.Ended, RunLog._ended),
}


def clipped(text: str, most: int = MAX_TEXT) -> str:
    """The text, cut to `most` characters with what was left out counted."""
    return text if len(text) <= most else f"{text[:most]} … {len(text) - most:,} more characters"


def _step_of(line: bytes) -> dict[str, Any] | None:
    """The event of a line that we wrote of a step, without the looks that a stranger's line needs: it is short."""
    if len(line) > _MAX_STEP_LINE or not line.startswith(_STEP_LINE):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _moment(time: Any) -> float | None:
    """Seconds since 1970 of a time of day as events carry it; None for what is none."""
    if not isinstance(time, str) or len(time) > 40:
        return None
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # of a whole number with hundreds of digits
        return NAN
