"""Who computes which packs of a step."""

from __future__ import annotations

import json
from itertools import product

import pytest

from qlora import foreign_json
from qlora.dealing import FASTEST, Cut, Shares, dealt, in_order, relative


def shares(speeds: tuple[int, ...], rows: tuple[int, ...] | None = None, **more: bool) -> Shares:
    return Shares(rows=rows or (1,) * len(speeds), speeds=speeds, cards=("cpu",) * len(speeds), **more)


def test_one_process_computes_packs_in_their_order() -> None:
    assert in_order(5, 2) == Cut(((0, 1), (2, 3), (4,)), (2, 2, 2), (0, 0, 0)) == dealt([7] * 5, shares((1000,), (2,)))
    assert in_order(0, 2) == Cut((), (), ()) == dealt([], shares((1000, 1000)))


@pytest.mark.parametrize(("count", "packs", "rows"), [(2, 5, 1), (4, 16, 2), (3, 2, 1)])
def test_equal_processes_and_packs_take_turns(count: int, packs: int, rows: int) -> None:
    """With the micro-batches of one process and their numbers, whoever computes them."""
    cut = dealt([64] * packs, shares((FASTEST,) * count, (rows,) * count))
    one = in_order(packs, rows)
    assert (cut.parts, cut.rows) == (one.parts, one.rows)
    assert cut.owners == tuple(number % count for number in range(len(one.parts)))


def test_a_faster_process_computes_more() -> None:
    """2.78 : 1, as arithmetic of a 3090 and a 3060 stands: 12 and 4 of 16."""
    cut = dealt([2048] * 16, shares((1000, 359)))
    assert [cut.owners.count(process) for process in (0, 1)] == [12, 4]
    assert cut.work_of([2048] * 16, 2) == (12 * 2048, 4 * 2048)


@pytest.mark.parametrize("speeds", [(1000, 1000), (1000, 450), (300, 1000, 700)])
def test_the_slowest_is_never_a_third_over_the_best(speeds: tuple[int, ...]) -> None:
    """Against every way to deal six packs of different lengths."""
    lengths = [512, 90, 300, 44, 700, 128]

    def ends(owners: tuple[int, ...]) -> float:
        loads = [sum(length for length, owner in zip(lengths, owners, strict=True) if owner == p) for p in range(9)]
        return max(load / speed for load, speed in zip(loads, speeds, strict=False))

    best = min(ends(owners) for owners in product(range(len(speeds)), repeat=len(lengths)))
    found = dealt(lengths, shares(speeds))
    assert best <= ends(found.owners) <= 4 / 3 * best and found.parts == in_order(6, 1).parts


def test_runs_from_before_go_on_in_turn() -> None:
    assert dealt([9, 512, 9, 9], shares((1000, 1000), in_turn=True)).owners == (0, 1, 0, 1)
    assert dealt([9, 512, 9, 9], shares((1000, 1000))).owners == (1, 0, 1, 1)


def test_a_process_that_holds_less_computes_smaller_micro_batches() -> None:
    cut = dealt([64] * 16, shares((1000, 340), (4, 1)))
    assert sorted(place for part in cut.parts for place in part) == list(range(16))
    sizes = [[len(part) for part, owner in zip(cut.parts, cut.owners, strict=True) if owner == p] for p in (0, 1)]
    assert sizes == [[4, 4, 4], [1, 1, 1, 1]]
    assert list(cut.parts) == sorted(cut.parts) and set(cut.rows) == {1, 4}
    odd = dealt([64] * 7, shares((1000, 1000), (3, 2)))  # of its three rows two are of use
    assert max(len(part) for part in odd.parts) == 2 and len(set(sum(odd.parts, ()))) == 7


def test_speeds_are_of_the_fastest() -> None:
    assert relative([2000.0, 500.0, 0.01]) == (1000, 250, 1)
    assert relative([0.0, 0.0]) == (1000, 1000) and relative([10.0, 0.0]) == (1000, 1000)


def test_they_are_read_back_from_a_state_and_what_is_strange_is_refused() -> None:
    kept = shares((1000, 359), (4, 1)).model_dump()
    assert foreign_json.checked(Shares, json.loads(json.dumps(kept)), "state") == shares((1000, 359), (4, 1))
    for strange in ({"rows": [0, 1]}, {"speeds": [0, 1]}, {"cards": []}, {"took": [-1, 2]}):
        with pytest.raises(foreign_json.ForeignFileError):
            foreign_json.checked(Shares, {**json.loads(json.dumps(kept)), **strange}, "state")
