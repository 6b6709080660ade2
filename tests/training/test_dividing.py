"""Pieces of work among processes, which are threads here: all get all results, and one that fails ends it in all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from qlora.errors import DataError
from qlora.processes import Place
from qlora.stop import StopAsked
from qlora.training import dividing
from qlora.training.dividing import FINE, NO_MEMORY, STOP, Division, divided, worst


class Left(Exception):
    """What `ends` raises: the worst process and its code."""


class Unsharded:
    """Of weights that every process has whole."""

    def shared(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return work


class Thread:
    """One of `size` joined threads."""

    def __init__(self, rank: int, size: int, joined: threading.Barrier, board: list[Tensor]) -> None:
        self.place, self.joined, self.board = Place(rank, size, rank, size), joined, board

    @property
    def gathers(self) -> Any:
        return Unsharded()

    def _exchanged(self, values: Tensor, how: Callable[[Tensor], Tensor]) -> None:
        self.board[self.place.rank] = values.clone()
        self.joined.wait(10)
        values.copy_(how(torch.stack(self.board)))
        self.joined.wait(10)

    def largest(self, values: Tensor) -> None:
        self._exchanged(values, lambda all_of_them: all_of_them.amax(0))

    def collect(self, values: Tensor) -> None:
        assert values.dtype == torch.int64
        self._exchanged(values, lambda all_of_them: all_of_them.sum(0))

    def add(self, values: Tensor) -> None: ...

    def copy(self, values: Tensor) -> None: ...


def ends(codes: list[int], _reason: str) -> NoReturn:
    raise Left(*worst(codes))


def by(size: int, items: list[int], work: Callable[[int, int], Tensor]) -> list[Future[list[Tensor]]]:
    """What `size` threads make of the items; `work` gets the number of the thread too."""
    joined, board = threading.Barrier(size), [torch.zeros(0)] * size
    with ThreadPoolExecutor(size) as pool:
        threads = [Thread(rank, size, joined, board) for rank in range(size)]
        return [
            pool.submit(divided, one, items, lambda item, rank=rank: work(rank, item), ends)  # type: ignore[misc]
            for rank, one in enumerate(threads)
        ]


def measured(item: int) -> Tensor:
    """Results of several lengths, with what a sum of numbers would lose."""
    hard = [float("nan"), float("inf"), -0.0, 0.1 + item, 1e-310, 2.0**53 - item]
    return torch.tensor(hard[: 1 + item % 6] * (item != 4), dtype=torch.float64)


@pytest.mark.parametrize(("size", "count"), [(2, 7), (3, 29), (4, 2), (2, 0)])
def test_all_get_every_result_to_the_last_bit(size: int, count: int) -> None:
    done: list[tuple[int, int]] = []

    def work(rank: int, item: int) -> Tensor:
        done.append((item, rank))
        return measured(item)

    for made in by(size, list(range(count)), work):
        bits = [one.view(torch.int64).tolist() for one in made.result()]
        assert bits == [measured(item).view(torch.int64).tolist() for item in range(count)]
    assert sorted(done) == [(item, item % size) for item in range(count)]


def test_alone_it_is_the_work_itself() -> None:
    assert Division().shared([1, 2], torch.tensor) == [torch.tensor(1), torch.tensor(2)]


@pytest.mark.parametrize(
    ("error", "code", "own"),
    [
        (StopAsked(), STOP, StopAsked),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB."), NO_MEMORY, Left),
        (DataError("a row", "mend it"), 2, DataError),
        (ValueError("a mistake of ours"), 1, ValueError),
    ],
)
def test_one_that_fails_ends_it_in_all_within_a_round(error: Exception, code: int, own: type[Exception]) -> None:
    done: list[int] = []

    def work(rank: int, item: int) -> Tensor:
        if rank == 1 and item >= 9:
            raise error
        done.append(item)
        return measured(item)

    made = by(3, list(range(300)), work)
    assert max(done) < 2 * 3 * dividing.ROUND
    for rank, one in enumerate(made):
        with pytest.raises(own if rank == 1 else Left) as caught:
            one.result()
        assert rank == 1 or caught.value.args == (1, code)


def test_the_worst_is_what_ends_a_run() -> None:
    assert worst([FINE, FINE]) == (0, FINE)
    assert worst([NO_MEMORY, STOP, FINE]) == (1, STOP)
    assert worst([STOP, NO_MEMORY, 4]) == (2, 4)
