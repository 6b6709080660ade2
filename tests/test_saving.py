"""What is written beside the steps: said when it is on the disk, counted when it fails, waited for where it must be."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.errors import DoesNotFit, TrainingStopped
from qlora.events import Event, Recorder, Saved
from qlora.saving import Saving
from tests.runs import values

FULL = OSError(errno.ENOSPC, "No space left on device")


class Slow:
    """A publisher that waits until it may."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step, self.error = step, error
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self) -> Saved:
        self.thread = threading.current_thread()
        self.begun.set()
        assert self.may_end.wait(30)
        if self.error is not None:
            raise self.error
        return Saved("checkpoint", self.step, f"step-{self.step}", 1)


def begun(saving: Saving, step: int, error: BaseException | None = None) -> Slow:
    work = Slow(step, error)
    saving.begin(step, work)
    assert work.begun.wait(30)
    return work


def settled(step: int, error: BaseException | None = None) -> Callable[[], Saved]:
    work = Slow(step, error)
    work.may_end.set()
    return work


def test_saved_is_said_when_it_is_on_the_disk_and_not_before() -> None:
    recorder = Recorder()
    saving = Saving(Path("run"), recorder)
    work = begun(saving, 3)
    saving.look()
    assert not recorder.events and saving.saved_step == -1  # and the caller goes on
    assert work.thread is not None and work.thread is not threading.current_thread()
    work.may_end.set()
    work.thread.join(30)
    saving.look()
    assert values(recorder, "saved", "step") == [3] and saving.saved_step == 3
    saving.settle()
    assert len(recorder.events) == 1


def test_a_failure_surfaces_where_it_is_waited_for_and_three_end_the_run() -> None:
    recorder = Recorder()
    saving = Saving(Path("run"), recorder)
    saving.begin(1, settled(1))
    saving.settle()
    for step in (2, 3):
        saving.begin(step, settled(step, FULL))
        saving.settle()
    saving.begin(4, settled(4, FULL))
    with pytest.raises(TrainingStopped, match=r"the state of step 4 could not be saved .*; step 1 is the last saved"):
        saving.settle()
    said = values(recorder, "recovered", "message")
    assert [message.rpartition("; ")[2] for message in said] == [f"attempt {n} of 3" for n in (1, 2, 3)]
    assert values(recorder, "recovered", "step") == [2, 3, 4]


def test_a_listener_that_fails_makes_no_save_a_failed_one() -> None:
    class Broken(Recorder):
        def emit(self, event: Event) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    saving = Saving(Path("run"), Broken())
    saving.begin(7, settled(7))
    with pytest.raises(BrokenPipeError):
        saving.settle(last_chance=True)
    assert (saving.saved_step, saving.failures) == (7, 0)


def test_the_last_chance_has_no_next_time() -> None:
    saving = Saving(Path("run"), Recorder())
    saving.begin(1, settled(1, FULL))
    with pytest.raises(TrainingStopped, match="nothing is saved yet"):
        saving.settle(last_chance=True)


def test_a_run_that_ends_by_an_error_waits_for_what_is_being_written() -> None:
    """And the error stays the one that ended it, whatever became of the save."""
    for error in (None, FULL):
        recorder = Recorder()
        saving = Saving(Path("run"), recorder)
        saving.failures = 2
        with pytest.raises(DoesNotFit, match="too large"), saving:
            work = begun(saving, 5, error)
            threading.Timer(0.05, work.may_end.set).start()
            raise DoesNotFit("too large", "smaller")
        assert [event.kind for event in recorder.events] == ["recovered" if error else "saved"]
        assert work.thread is not None and not work.thread.is_alive()


def test_what_is_no_failure_to_write_is_raised_as_it_is() -> None:
    saving = Saving(Path("run"), Recorder())
    saving.begin(1, settled(1, TrainingStopped("run: the folder was moved", "put it back")))
    with pytest.raises(TrainingStopped, match="moved"):
        saving.settle()
    saving.settle()  # it is over


def test_a_wait_that_a_signal_ends_can_be_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    saving = Saving(Path("run"), recorder)
    work = begun(saving, 7)
    assert saving._writing is not None
    future = saving._writing[1]

    def interrupted(*_: object) -> Saved:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(future, "result", interrupted)
        saving.settle()
    work.may_end.set()
    saving.settle()
    assert values(recorder, "saved", "step") == [7]
