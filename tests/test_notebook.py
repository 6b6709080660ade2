"""Calls of the API in a notebook: drawn below the cell, stopped by its interrupt. In a script nothing changes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from qlora.errors import StoppedBySignal, UserError
from qlora.events import Notice, Recorder
from qlora.notebook import at_work
from qlora.stop import StopAsked, StopRequest
from tests.notebooks import Page, open_notebook


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return open_notebook(monkeypatch)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT as an interpreter has it; one that a shell began in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_a_script_is_left_alone() -> None:
    before, stop = signal.getsignal(signal.SIGINT), StopRequest()
    with at_work(None) as (sink, _):
        assert signal.getsignal(signal.SIGINT) is before and sink.sinks == ()
    mine = Recorder()
    with at_work(mine, stop) as (sink, request):
        assert sink.sinks == (mine,) and request is stop
    with pytest.raises(KeyboardInterrupt), at_work(None):
        interrupt()


def test_it_draws_and_is_closed_also_by_an_error(page: Page) -> None:
    with pytest.raises(UserError), at_work(None) as (sink, _):
        sink.emit(Notice("rows", "a notice"))
        raise UserError("what", "hint")
    assert "a notice" in page.text
    mine = Recorder()
    with at_work(mine) as (sink, _):
        sink.emit(Notice("rows", "another"))
    with at_work(None, drawn=False) as (sink, _):
        sink.emit(Notice("rows", "silent"))
    assert len(mine.events) == 1 and page.text == "rows: a notice\n"


def test_a_step_is_finished_and_the_second_interrupt_does_not_wait(page: Page) -> None:
    before = signal.getsignal(signal.SIGINT)
    with at_work(None) as (_, request), request.being_read():
        interrupt()
        assert request.is_set
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("raised", [KeyboardInterrupt, StopAsked])
def test_outside_of_training_it_ends_with_two_lines(page: Page, raised: type[BaseException]) -> None:
    with pytest.raises(StoppedBySignal, match="outside of training") as error, at_work(None) as (_, request):
        if raised is StopAsked:
            request.set()
            raise StopAsked
        interrupt()
    assert "mode='resume'" in error.value.hint and error.value.exit_code == 130


def test_an_interrupt_that_a_library_swallows_is_raised_again(page: Page) -> None:
    with pytest.raises(StoppedBySignal), at_work(None) as (sink, _):
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        sink.emit(Notice("rows", "the next event"))
    assert page.outputs == []


def test_a_call_within_a_call_has_one_handler_and_the_callers_request_none(page: Page) -> None:
    with at_work(None) as (sink, request):
        handler = signal.getsignal(signal.SIGINT)
        with at_work(sink):
            assert signal.getsignal(signal.SIGINT) == handler
        assert not request.is_set
    before = signal.getsignal(signal.SIGINT)
    with at_work(None, StopRequest()):
        assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_works_and_says_that_no_interrupt_reaches_it(page: Page) -> None:
    found: list[Any] = []

    def work() -> None:
        with at_work(None) as (sink, request):
            sink.emit(Notice("rows", "worked"))
            found.append(request)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1 and "no interrupt reaches" in page.text and "rows: worked" in page.text
