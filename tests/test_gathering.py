"""Who gathers when: processes that do not run in step, of which some fail, over gloo as they are."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import gathering
from qlora.errors import DoesNotFit, TrainingStopped
from qlora.gathering import Gathers, part_bytes
from qlora.processes import Place
from tests.sharing import Parts, share, whole


def test_parts_are_equal_and_begin_where_a_load_may() -> None:
    assert part_bytes(1000, 1) == 1008 and part_bytes(1000, 2) == 512 and part_bytes(96, 4) == 32
    assert all(part_bytes(size, 3) * 3 >= size and part_bytes(size, 3) % 16 == 0 for size in range(1, 200))


def test_alone_nothing_is_shared() -> None:
    assert gathering.of_run() is None
    with gathering.loading(1, None), gathering.loading(2, None):
        pass  # the second: shared by recipe, and nobody is there


def test_as_many_as_each_wants_in_any_order(tmp_path: Path) -> None:
    """The second wants fewer things, others, and in another order; it takes part until the first has all of its own."""

    def first(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            got = [parts.get(number) for number in (1, 2, 3, 2, 1)]
        return got, gathers.gathered, gathers.rounds

    def second(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            got = [parts.get(number) for number in (1, 3)]
        return got, gathers.gathered, gathers.rounds

    ended, given = share(tmp_path, first, second)
    assert ended.codes == [0, 0]
    assert [one[0] for one in given] == [whole(1, 2, 3, 2, 1), whole(1, 3)]
    # 1 is gathered once for both, 3 too: it is the second's wish until it is the first's.
    assert [one[1:] for one in given] == [[5, 6], [5, 6]]


def test_one_with_nothing_to_do_takes_part_all_the_same(tmp_path: Path) -> None:
    def idle(gathers: Gathers) -> Any:
        Parts(gathers)
        with gathers.session():
            pass
        return gathers.gathered

    def busy(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            return [parts.get(number) for number in (4, 5)]

    assert share(tmp_path, idle, busy)[1] == [2, whole(4, 5)]


def test_the_first_alone_until_it_says_that_it_is_done(tmp_path: Path) -> None:
    """Outside of a session its first wish is announced, and the others answer until its next word."""

    def first(gathers: Gathers) -> Any:
        parts, announced = Parts(gathers), []
        gathers._announce = lambda: announced.append(len(announced))
        got = [parts.get(1), parts.get(2)]
        gathers.end()
        gathers.end()  # nothing is open
        with gathers.session():
            got.append(parts.get(3))
        return got, announced, parts.forgotten

    def second(gathers: Gathers) -> Any:
        Parts(gathers)
        gathers.answer()
        with gathers.session():
            pass
        return gathers.gathered

    assert share(tmp_path, first, second)[1] == [[whole(1, 2, 3), [0], 1], 3]


def test_an_error_between_two_gathers_leaves_nobody_waiting(tmp_path: Path) -> None:
    """Memory that ran out, a stop, an error of any kind: whoever has it serves first, then raises it."""

    def failing(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        try:
            with gathers.session():
                parts.get(1)
                raise torch.OutOfMemoryError("CUDA out of memory.")
        except torch.OutOfMemoryError:
            return gathers.gathered

    def other(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            return [parts.get(number) for number in (1, 2, 3)]

    assert share(tmp_path, failing, other)[1] == [3, whole(1, 2, 3)]


def test_what_was_asked_for_ahead_and_is_not_wanted_is_gathered_and_forgotten(tmp_path: Path) -> None:
    def ahead(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            got = parts.get(1)
            gathers.want(2, torch.zeros(32, dtype=torch.uint8), parts.room()[1], None)
        return got, gathers.gathered

    def other(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            return [parts.get(1), parts.get(3)], gathers.gathered

    ended, given = share(tmp_path, ahead, other)
    assert ended.codes == [0, 0] and given[0] == [whole(1)[0], 3] and given[1][0] == whole(1, 3)


@pytest.mark.parametrize("code", [3, 1])
def test_one_that_cannot_load_its_part_is_named(tmp_path: Path, code: int) -> None:
    """By its exit code: a card that is too small ends all as one that is too small."""

    def loads(gathers: Gathers) -> Any:
        with gathers.loading():
            parts = Parts(gathers)
            parts.get(0)

    def fails(gathers: Gathers) -> Any:
        with gathers.loading():
            raise DoesNotFit("too small", "") if code == 3 else ZeroDivisionError

    ended, _ = share(tmp_path, loads, fails)
    assert ended.codes[0] == (3 if code == 3 else TrainingStopped.exit_code)
    assert ended.said[0].startswith(f"process 1 of 2 has failed with exit code {code}")
    assert ended.codes[1] == (3 if code == 3 else 99)


def test_one_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    def lives(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            parts.get(1)
            parts.get(2)

    def dies(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            parts.get(1)
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    ended, _ = share(tmp_path, lives, dies, seconds=50.0)
    assert ended.codes == [4, -9] and ended.said[0].startswith("gone: ")
    assert time.monotonic() - began < 40.0


def test_one_that_hangs_is_waited_for_as_long_as_was_said(tmp_path: Path) -> None:
    def waits(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            parts.get(1)

    def hangs(gathers: Gathers) -> Any:
        parts = Parts(gathers)
        with gathers.session():
            time.sleep(3.0)
            parts.get(1)

    ended, _ = share(tmp_path, waits, hangs, seconds=1.0)
    assert ended.codes == [4, 4] and "no answer for 1 s" in ended.said[0]


class Silent:
    place = Place(1, 2)


def test_nobody_but_the_first_begins_by_itself() -> None:
    gathers = Gathers(Silent(), lambda: None, 1.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="nobody else computes"):
        gathers.want(0, torch.zeros(1), None, None)  # type: ignore[arg-type]
    gathers._begin(1.0)
    with pytest.raises(AssertionError, match="not nested"):
        gathers._begin(1.0)
    gathers.close()
