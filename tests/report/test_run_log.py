"""A run's events, read once and in bounded memory, whatever the file holds."""

from __future__ import annotations

import json
import math

import pytest

from qlora.report import run_log
from qlora.report.run_log import RunLog, clipped
from tests.report.runs_told import end, line, start, step, whole


def fed(*lines: str) -> RunLog:
    log = RunLog()
    for one in lines:
        log.feed(one.encode())
    log.steps.settle()
    return log


def test_a_whole_run_is_all_there() -> None:
    log = fed(*whole())
    assert not log.foreign and not log.unknown and not log.unreadable and not log.left_out
    assert list(log.steps.number) == list(range(1, 41)) and log.steps.columns["loss"][3] == 1.0
    assert sorted(log.evaluations) == [10, 20, 30, 40] and log.saved == {"checkpoint": 4}
    assert log.started and log.plan and log.ended and log.fidelity and len(log.samples) == 1 and len(log.rejected) == 1
    assert [mark.kind for mark in log.marks if mark.kind not in ("evaluated", "saved")] == [
        "notices",
        "recovered",
        "ended",
    ]
    assert log.at == 80.0


def test_of_a_step_told_twice_the_later_counts() -> None:
    log = fed(start(), step(1), step(2, loss=9.0), step(3), step(2, 7, loss=1.5))
    assert list(log.steps.number) == [1, 2, 3] and log.steps.columns["loss"][1] == 1.5


def test_what_a_resumed_process_does_again_is_forgotten() -> None:
    told = {"loss": 1.0, "perplexity": 2.0, "exact_match": None, "rows": 5, "best": True}
    first = (start(), *(step(number) for number in range(1, 8)), line("eval", 14, step=6, **told))
    log = fed(*first, start(1000, resumed_from_step=5), step(6, 1002, loss=0.5))
    assert list(log.steps.number) == [1, 2, 3, 4, 5, 6] and log.steps.columns["loss"][-1] == 0.5
    assert not log.evaluations and [(one.step, one.pause) for one in log.processes] == [(0, 0.0), (5, 986.0)]
    assert log.at == 16.0  # the pause is no work
    assert list(fed(*first, start(1000), step(1, 1002)).steps.number) == [1]  # one that begins anew


def test_an_end_counts_until_a_process_goes_on() -> None:
    assert fed(start(), step(1), end(4, 1)).ended is not None
    assert fed(start(), step(1), end(4, 1), start(9, resumed_from_step=1)).ended is None


def test_a_clock_that_goes_back_takes_no_time_away() -> None:
    log = fed(start(), step(1, 10), step(2, 4), step(3, 6))
    assert log.at == 12.0 and log.clock_went_back == 1 and list(log.steps.columns["at"]) == [10.0, 10.0, 12.0]


def test_files_without_times_go_by_the_steps() -> None:
    plain = [json.dumps({**json.loads(step(number)), "time": None}) for number in (1, 2)]
    assert fed(*plain).at == 4.0
    assert fed(line("notice", topic="a", message="b").replace("2026", "99999")).at == 0.0


def test_lines_of_others_and_of_later_versions_are_counted() -> None:
    odd = ("", "my note\n", "[1]\n", "{}\n", '{"event": 3}\n', '{"event": "step"', "[" * 90_000, "\x00\n")
    later = (line("telepathy", words=1), line("eval", step="seven"), step(1, loss="low"), step(-1), step(1 << 60, 9))
    log = fed(*odd, *later, step(1), json.dumps({"event": "step", "step": 2}))
    assert log.foreign == len(odd) and log.unknown == {"telepathy": 1} and log.unreadable == {"eval": 1, "step": 3}
    assert list(log.steps.number) == [1, 2] and math.isnan(log.steps.columns["loss"][1])


def test_numbers_that_are_none_are_read() -> None:
    log = fed(
        step(1, loss=math.nan), step(2, loss=math.inf), step(3, grad_norm=10**400), end(8, 3, train_loss=math.nan)
    )
    assert math.isnan(log.steps.columns["loss"][0]) and math.isinf(log.steps.columns["loss"][1])
    assert log.ended is not None and len(log.steps.number) == 3


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MAX_STEPS", 10)
    monkeypatch.setattr(run_log, "MAX_KEPT", 20)
    monkeypatch.setattr(run_log, "_MAX_MARKS", 5)
    texts = {"prompt": "p" * 90_000, "expected": "", "base": "", "tuned": ""}
    many = [line("notice", topic=f"t{number}", message="m" * 9_000, count=number) for number in range(50)]
    many += [line("sample", step=1, **texts) for _ in range(9)] + [line(f"kind{number}") for number in range(99)]
    many += [line("rejected", source=f"s{number}", reason="", count=1) for number in range(50)]
    log = fed(*many, *(step(number) for number in range(1, 31)))
    assert len(log.told) == len(log.rejected) == 20 and log.left_out["notices"] == 30 and log.left_out["steps"] == 20
    assert len(log.samples) == 2 and len(log.samples[0].prompt) < 4_100 and len(log.marks) == 5
    assert len(log.unknown) == 21 and log.unknown["others"] == 79


def test_what_is_cut_is_counted() -> None:
    assert clipped("abc", 3) == "abc" and clipped("abcd", 3) == "abc … 1 more characters"


def test_a_notice_said_again_is_counted() -> None:
    log = fed(*[line("notice", topic="a", message="b", count=count) for count in (None, 4, 2)])
    (told,) = log.told.values()
    assert (told.times, told.count) == (3, 4)


def test_long_texts_of_rejected_rows_and_of_exports_are_cut() -> None:
    long = "x" * 100_000
    rejected = line("rejected", source="a", reason="b", count=9, examples=[long] * 100)
    log = fed(rejected, line("exported", format=long, path=long, bytes=1, merge_base=long))
    assert len(str(log.rejected)) < 2_000 and log.rejected["a", "b"].count == 9
    assert len(str(log.exported)) < 20_000 and next(iter(log.exported.values())).bytes == 1
