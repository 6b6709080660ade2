"""How a run is asked to stop and to save."""

from __future__ import annotations

import signal

import pytest

from qlora.stop import StopAsked, StopRequest


def test_a_request_is_seen_where_it_is_asked_for() -> None:
    stop = StopRequest()
    stop.check()
    assert not stop.is_set
    stop.set()
    assert stop.is_set
    with pytest.raises(StopAsked):
        stop.check()


def test_it_is_read_only_inside_of_the_block_even_when_that_fails() -> None:
    stop = StopRequest()
    with pytest.raises(ZeroDivisionError), stop.being_read():
        assert stop.is_read
        raise ZeroDivisionError
    assert not stop.is_read


def test_a_request_to_save_is_taken_once_and_stops_nothing() -> None:
    stop = StopRequest()
    stop.ask_to_save()
    stop.check()
    assert stop.take_save_request() and not stop.take_save_request()


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_the_error_names_the_signal(number: int, name: str, code: int) -> None:
    stop = StopRequest()
    stop.set(number)
    error = stop.error("saved after step 5", "go on with --resume")
    assert error.what == f"stopped by {name}: saved after step 5" and error.exit_code == code


def test_a_caller_who_names_no_signal_interrupts() -> None:
    assert StopRequest().error("a", "b").exit_code == 130
