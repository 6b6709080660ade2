"""Items made ahead are the same items; not too many of them; and nothing goes on when nobody wants them any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from qlora.export.ahead import ITEMS_AHEAD, ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_the_same_items_in_the_same_order_from_another_thread() -> None:
    makers = set()

    def items() -> Iterator[int]:
        for number in range(50):
            makers.add(threading.current_thread().name)
            yield number

    assert list(ahead(items())) == list(range(50))
    assert list(ahead([])) == []
    assert len(makers) == 1 and makers != {threading.current_thread().name}
    assert threads() == []


def test_one_within_the_other() -> None:
    doubled = (2 * number for number in ahead(range(30)))
    assert list(ahead(doubled)) == list(range(0, 60, 2))


def test_an_error_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for item in ahead(items()):
            seen.append(item)
    assert seen == [0, 1, 2] and threads() == []


def test_what_is_made_ahead_is_bounded_and_ends_with_whoever_used_it() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    coming = ahead(items())
    assert next(coming) == 0
    deadline = time.monotonic() + 20
    while len(made) < ITEMS_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == list(range(ITEMS_AHEAD))
    assert next(coming) == 1
    coming.close()
    assert len(made) <= ITEMS_AHEAD + 1 and threads() == []
