"""Curves and a table of a run of GRPO, and nothing of any other run."""

from __future__ import annotations

import io
import json

from qlora.events import Event, StepDone
from qlora.report import rewards
from qlora.report.console import ConsoleSink, Terminal
from qlora.report.figures import short_name, worth
from qlora.report.page import page
from qlora.report.run_log import RunLog
from qlora.reward_events import Rewarded

PATTERN = "regex:" + "a" * 60
STEP = Rewarded(1, False, 8, 0.25, {"exact_match": 0.125, PATTERN: 0.5}, 12.5, 0.5, 0.75, 0.0125, 0.0, 0.001)
HELD_OUT = Rewarded(1, True, 32, 0.5, {"exact_match": 0.4375, PATTERN: 0.0625}, 9.25, 0.125)
LATER = Rewarded(2, False, 8, 0.5, {"exact_match": 0.5}, 10.0, 0.0, 0.0, None, 0.25)
TOLD: tuple[Event, ...] = (STEP, HELD_OUT, LATER)


def log_of(events: tuple[Event, ...]) -> RunLog:
    log = RunLog()
    for event in events:
        log.feed(json.dumps(event.as_dict()).encode())
    return log


def test_what_events_say_stands_on_the_page() -> None:
    log = log_of(TOLD)
    steps, evaluations = log.rewarded
    assert list(steps) == [1, 2] and list(evaluations) == [1] and not log.unreadable
    drawn = {chart.title: [line.name for line in chart.lines] for chart in rewards.charts(steps, evaluations)}
    assert drawn == {
        "Mean reward": ["training", "evaluation"],
        "KL from the model as it was, nats a token": ["training"],
        "Tokens of an answer": ["training", "evaluation"],
        "Groups without a signal, %": ["training"],
    }
    html = page("run", *rewards.section(evaluations))
    assert all(shown in html for shown in ("exact_match", "0.4375", "0.0625", "9.2", "12.5%"))
    assert not list(rewards.charts({}, {})) and not list(rewards.section({}))


def test_a_run_that_goes_on_forgets_what_it_does_again() -> None:
    log = log_of(TOLD)
    started = {"event": "start", "recipe": "r", "run_dir": "d", "base": "b", "commit": None, "device": "cpu"}
    log.feed(json.dumps({**started, "versions": {}, "resumed_from_step": 1}).encode())
    assert [list(one) for one in log.rewarded] == [[1], [1]]


def test_a_line_says_what_answers_were_worth() -> None:
    assert worth(STEP) == (
        f"reward 0.250 (exact_match 0.125, {short_name(PATTERN)} 0.500) · KL 0.0125 · 12 tokens · 50% cut · "
        "75% groups all alike"
    )
    assert worth(LATER) == "reward 0.500 (exact_match 0.500) · 10 tokens · 25% tokens clipped"
    assert len(short_name(PATTERN)) == 41


def test_the_screen_shows_it_beside_the_step() -> None:
    file = io.StringIO()
    sink = ConsoleSink(Terminal(file, width=200, force_terminal=False))
    sink.emit(HELD_OUT)
    sink.emit(STEP)
    sink.emit(StepDone(2, 0.1, 0.5, 1e-4, 1.0, 100, 50, 10.0, 1, 1.0))
    sink.close()
    shown = file.getvalue()
    assert "of 32 held out: reward 0.500 (exact_match 0.438" in shown
    assert "before it: reward 0.250" in shown
