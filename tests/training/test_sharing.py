"""How a run's steps are shared, and that it follows from the run's state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlora.dealing import Shares
from qlora.events import Recorder
from qlora.recipe.reading import recipe_of_base
from qlora.training import sharing
from qlora.training.checkpoint import RunState
from qlora.training.memory_plan import MemorySettings
from qlora.training.sharing import Sharing, Stopwatch

OWN = MemorySettings(4, True)
LENGTHS = [64] * 16


def unequal(*settings: str, small: MemorySettings | None = None) -> Sharing:
    """A card, and one that is taken to be half as fast and holds `small`."""
    first = Shares(rows=(4, 4), speeds=(1000, 500), cards=("big", "small"), settled=False)
    others = {1: small or replace(OWN, micro_batch_size=1)}
    return Sharing(2, recipe_of_base("owner/name", settings), Recorder(), first, others)


def said(of: Sharing) -> list[str]:
    return [event.as_dict()["message"] for event in of.sink.events]  # type: ignore[attr-defined]


def test_equal_cards_share_alike_and_no_clock_is_asked() -> None:
    alike = Sharing.of(OWN, 2, recipe_of_base("owner/name"), Recorder())
    state = alike.after_step(RunState(step=1), OWN)
    assert state.shares is not None and state.shares.speeds == (1000, 1000) and state.shares.settled
    assert not alike.measures(RunState(step=2)) and alike.settings(OWN) == [OWN, OWN]
    assert alike.cut(RunState(), LENGTHS, OWN).owners == (0, 1, 0, 1)
    assert not alike.smaller(1, "no memory", 3)  # all of them become smaller


def test_a_small_card_computes_smaller_micro_batches_unless_something_is_drawn_for_each() -> None:
    assert unequal().shares(RunState(), OWN).rows == (4, 1)
    assert unequal("lora.dropout=0.1").shares(RunState(), OWN).rows == (1, 1)
    assert unequal("train.neftune_alpha=5").shares(RunState(), OWN).rows == (1, 1)


def run(of: Sharing, state: RunState, until: int, speeds: tuple[float, float] = (9.0, 3.0)) -> RunState:
    """Steps of cards that compute so many tokens a microsecond."""
    while state.step < until:
        cut = of.cut(state, LENGTHS, OWN)
        if of.measures(state):
            work = cut.work_of(LENGTHS, 2)
            of.measured = work, tuple(round(done / speed) for done, speed in zip(work, speeds, strict=True))
        state = of.after_step(replace(state, step=state.step + 1), OWN)
    return state


def test_what_is_measured_decides_once_and_is_told() -> None:
    of = unequal()
    before = run(of, RunState(), 3)
    assert before.shares is not None and before.shares.speeds == (1000, 500) and not said(of)
    after = run(of, before, 4)
    assert (
        after.shares is not None and after.shares.settled and after.shares.speeds == (1000, 331)
    )  # of whole microseconds
    (line,) = said(of)
    assert "measured until step 4" in line and "process 1 (small) 25%, predicted 33%" in line
    assert run(of, after, 8, (1.0, 1.0)).shares == after.shares and len(said(of)) == 1
    owners = of.cut(after, LENGTHS, OWN).owners
    assert owners.count(1) == 4 and owners.count(0) == 3  # 12 packs in micro-batches of 4, and 4 of one


def test_a_stopped_run_goes_on_with_the_same_shares() -> None:
    """Stopped while it measures, and after it."""
    straight = [run(unequal(), RunState(), step).shares for step in range(9)]
    for stop in (2, 3, 4, 6):
        resumed = run(unequal(), run(unequal(), RunState(), stop), 8)
        assert resumed.shares is not None and straight[8] is not None
        assert (resumed.shares.speeds, resumed.shares.rows) == (straight[8].speeds, straight[8].rows)


def test_a_process_that_computed_nothing_keeps_what_was_predicted_of_it_beside_the_others() -> None:
    of = unequal()
    of.warm = True
    of.measured = (1024, 0), (512, 1)
    shares = of.after_step(RunState(step=4), OWN).shares
    assert shares is not None and shares.speeds == (1000, 500) and shares.settled


def test_other_cards_than_the_state_s_begin_anew_and_it_is_said() -> None:
    of = unequal()
    kept = Shares(rows=(1, 1, 1), speeds=(1000, 100, 1), cards=("a", "b", "c"))
    assert of.shares(RunState(step=3, shares=kept), OWN).speeds == (1000, 500)
    assert said(of) == ["shared by 2 processes from now on, by 3 before, whose shares hold no more"]
    same = unequal()
    assert same.shares(RunState(step=3, shares=of.first.model_copy(update={"speeds": (1000, 7)})), OWN).speeds[1] == 7
    assert not said(same)


def test_a_state_of_before_is_dealt_in_turn() -> None:
    alike = Sharing.of(OWN, 2, recipe_of_base("owner/name"), Recorder())
    assert alike.shares(RunState(step=3), OWN).in_turn and not alike.shares(RunState(), OWN).in_turn


def test_the_card_that_runs_out_takes_smaller_settings_alone_and_they_are_kept() -> None:
    of = unequal(small=replace(OWN, micro_batch_size=2))
    assert of.smaller(1, "no memory in process 1", 5)
    state = of.after_step(RunState(step=5), OWN)
    assert state.shares is not None and state.shares.rows == (4, 1)
    assert "no memory in process 1: micro-batches of 1 there" in said(of)[0]
    assert not of.smaller(1, "no memory in process 1", 6)  # one row, and all recomputed
    again = unequal(small=replace(OWN, micro_batch_size=2))
    assert again.shares(state, OWN).rows == (4, 1)  # as it fitted before


def test_a_clock_is_read_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 2.0])
    monkeypatch.setattr(sharing, "clock", lambda: next(times))
    watch, idle = Stopwatch(torch.device("cpu"), measures=True), Stopwatch(torch.device("cpu"), measures=False)
    assert watch.during(lambda: "done") == "done" and watch.took == 500_000
    assert idle.during(lambda: "done") == "done" and idle.took == 0
