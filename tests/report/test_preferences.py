"""Curves and a table of a run of preference, and nothing of any other run."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from qlora.events import End, Evaluated, Event, Preferred, StepDone
from qlora.report import preferences
from qlora.report.console import ConsoleSink, Terminal
from qlora.report.page import page
from qlora.report.run_log import RunLog
from qlora.report.run_page import page_of
from tests.report.runs_told import run_in, whole

TOLD: tuple[Event, ...] = (
    Preferred(1, False, 4, 0.25, 0.125, 0.5, 0.375, None),
    Preferred(1, True, 8, 0.75, 1.5, 1.0, -0.5, None, 0.0375),
    Preferred(2, False, 4, 1.0, None, 0.5, None, 2.5),
)


def test_what_events_say_stands_on_the_page() -> None:
    log = RunLog()
    for event in TOLD:
        log.feed(json.dumps(event.as_dict()).encode())
    steps, evaluations = log.preferred
    assert list(steps) == [1, 2] and list(evaluations) == [1] and not log.unreadable
    titles = [(chart.title, [line.name for line in chart.lines]) for chart in preferences.charts(steps, evaluations)]
    both = ["training", "evaluation"]
    rewards = ("Rewards of held-out answers", ["better", "worse"])
    assert titles == [("Answers told apart, %", both), ("Margin of rewards", both), rewards]
    html = page("run", *preferences.section(evaluations))
    assert all(shown in html for shown in ("75.0 %", "1.5000", "-0.5000", "0.0375"))
    assert ">KL</th>" in html and not any(f">{empty}</th>" in html for empty in ("divergence", "likelier"))
    assert not list(preferences.charts({}, {})) and not list(preferences.section({}))


def test_a_run_that_goes_on_forgets_what_it_does_again() -> None:
    log = RunLog()
    for event in TOLD:
        log.feed(json.dumps(event.as_dict()).encode())
    started = {"event": "start", "recipe": "r", "run_dir": "d", "base": "b", "commit": None, "device": "cpu"}
    log.feed(json.dumps({**started, "versions": {}, "resumed_from_step": 1}).encode())
    assert [list(found) for found in log.preferred] == [[1], [1]]


def test_the_screen_says_it_beside_the_losses() -> None:
    out = io.StringIO()
    sink = ConsoleSink(Terminal(out, width=200))
    sink.emit(Evaluated(1, 0.5, None, None, 16, True))
    for event in TOLD[1:]:
        sink.emit(event)
    sink.emit(StepDone(1, 0.1, 2.0, 1e-3, 0.5, 100, 40, 50.0, 1 << 20, 2.0))
    text = out.getvalue()
    assert "loss 0.5000 · best so far" in text and "perplexity" not in text
    assert "of 8 held out: 75.0% told apart · margin 1.500 · KL to the reference 0.0375 nats a token" in text
    assert "before it: 100.0% told apart · divergence 2.500 nats an answer" in text


def test_a_loss_of_answers_is_not_called_one_of_tokens(tmp_path: Path) -> None:
    """Neither on the screen nor on the page, whose first curves are what was told apart."""
    end = End("finished", 2, 2, 1.0, 10, 5, 0.5, 0.25, None, None, 1 << 20, None, None)
    screens = []
    for compares in (True, False):
        out = io.StringIO()
        sink = ConsoleSink(Terminal(out, width=200))
        for event in (*(TOLD if compares else ()), end):
            sink.emit(event)
        screens.append(out.getvalue())
    assert "0.2500" in screens[0] and "nats a token" not in screens[0].partition("ended")[2]
    assert "0.2500 nats a token" in screens[1]
    told = [f"{json.dumps({'time': '2026-02-01T00:00:00Z', **event.as_dict()})}\n" for event in TOLD]
    page = page_of([run_in(tmp_path, [*whole(), *told])])
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles[:3] == ["Loss", "Answers told apart, %", "Margin of rewards"]
