"""Events as a page reads them are those that runs write: none is refused, whichever version wrote it."""

from __future__ import annotations

import json
from pathlib import Path

from qlora import events, foreign_json
from qlora.events import Event
from qlora.report.run_events import Exam, ExportNote, Planned
from qlora.report.run_log import RunLog
from qlora.reward_events import Rewarded
from tests.report.cases import FIGURES
from tests.report.runs_told import PLAN

WRITTEN: tuple[Event, ...] = (
    events.Start("r", "/runs/r", "base", "c" * 40, "cpu", {"torch": "2"}, 4, {"threads": 2, "compiled": False}, None),
    events.Plan(1, 2, 3, 4, 5, 6, 7, 8, 9, 1.5, 10, 11, True, False, 12, "x"),
    events.Notice("a", "b", 3),
    events.StepDone(1, 0.1, 2.0, 1e-3, 0.5, 100, 40, 50.0, 1 << 20, 2.0),
    events.Evaluated(0, None, None, 0.5, 3, False),
    events.Preferred(1, True, 8, 0.75, 0.5, 0.25, -0.25, None, 0.01, 0.5),
    Rewarded(1, True, 8, 0.25, {"exact_match": 0.25}, 12.5, 0.5, 0.75, 0.0125, 0.0, 0.001),
    events.Routed(1, (1.0, 0.5), (0.25, 0.5), (0.0, 0.125)),
    events.Sampled(1, "a", "b", "c", "d"),
    events.Saved("adapter", 1, "p", 3),
    events.Recovered(1, "m"),
    events.Rejected("s", "r", 1, ("a:1",)),
    events.Fidelity("t", 1, 2, ({"name": "hf", "measured_by": "x", "kl": 0.0, "perplexity": 2.0, "top1": 1.0},)),
    events.Exported("hf", "p", 1, None, None),
    events.Examined(FIGURES),
    events.End("finished", 1, 2, 3.0, 4, 5, None, None, None, None, 6, None, None, None, {"load": 1.0}),
)


def test_every_event_that_is_kept_is_read() -> None:
    log = RunLog()
    for event in WRITTEN:
        log.feed(json.dumps(event.as_dict()).encode())
    assert not log.foreign and not log.unknown and not log.unreadable
    assert {event.kind for event in WRITTEN} == {kind.kind for kind in Event.__subclasses__()} - {"progress"}


def test_keys_of_later_versions_are_let_pass_and_those_that_older_ones_lack_have_defaults() -> None:
    old = {key: value for key, value in PLAN.items() if key not in ("memory", "attention", "resume")}
    assert foreign_json.checked(Planned, {**old, "of_tomorrow": [1]}, "x").memory is None


def test_the_files_beside_the_events_are_read_as_they_are_written(tmp_path: Path) -> None:
    assert "words" in foreign_json.checked(Exam, json.loads(json.dumps(FIGURES)), "x").parts
    entry = {"name": "hf", "measured_by": "x", "kl": 0.0, "perplexity": 2.0, "top1": 1.0, "bytes": None, "rows": 2}
    assert foreign_json.checked(ExportNote, {"format": "hf", "fidelity": [entry], "checks": []}, "x").fidelity
