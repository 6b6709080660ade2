"""Work in pieces that several processes share: each does some of them, and all get all results, to the last bit.

Evaluation, answers, what a reference says, and KTO's divergence are lists of pieces (micro-batches, batches of prompts)
whose results follow from the piece alone. Piece n is done by process n mod N, whole and as one process would do it, so
that every figure is that of one process; sums are made of the results, in their order. Results travel as bits: where
one process has a number and the others have zeros, the sum of integers is that number.

Every ROUND pieces the processes show each other how they are, before anything is waited for: memory that ran out, a
stop or a failure in one ends the work in all, within a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from qlora.errors import QloraError
from qlora.gathering import Gathers
from qlora.guarded import Attempt
from qlora.processes import Place
from qlora.stop import StopAsked

ROUND = 8  # pieces of each process between two looks: a stop waits for no more than these
FINE, NO_MEMORY, STOP = 0, 1000, 1001  # what a process shows; else the exit code of its error

Item = TypeVar("Item")
Result = TypeVar("Result")
Shown = TypeVar("Shown")
Word = dict[str, Any]
Ends = Callable[[list[int], str], NoReturn]  # raises what comes of the processes' codes; why memory ran out here


class Joint(Protocol):
    """What connects the processes (`channel.Channel`)."""

    gathers: Gathers

    @property
    def place(self) -> Place: ...

    def largest(self, values: Tensor) -> None:
        """Each value on the host becomes the largest of all processes'."""

    def collect(self, values: Tensor) -> None:
        """Each integer on the host becomes the sum of all processes'."""

    def add(self, values: Tensor) -> None:
        """Each value on the device becomes the sum of all processes'."""

    def copy(self, values: Tensor) -> None:
        """Values on the host become those of process 0."""


class Division:
    """How a run's work is shared: here it is one process's."""

    @contextmanager
    def called(self, _word: Word, _settings: Any) -> Iterator[None]:
        """The other processes begin the work that `word` names; inside the block this one does its part."""
        yield

    def shared(self, items: Sequence[Item], work: Callable[[Item], Tensor]) -> list[Tensor]:
        """The result of each item, in order. With several processes each does some: results are fp64, on the host, and
        flat; inside of `called`, or of a step, alone."""
        return [work(item) for item in items]


def worst(codes: Sequence[int]) -> tuple[int, int]:
    """A process that is not fine, and its code: one that failed before one that was asked to stop."""
    order = [code for code in codes if code not in (FINE, NO_MEMORY, STOP)] or [
        code for code in (STOP, NO_MEMORY) if code in codes
    ]
    return (codes.index(order[0]), order[0]) if order else (0, FINE)


def shown(work: Callable[[], Result], show: Callable[[int], Shown]) -> tuple[Result | None, Shown, str]:
    """What `work` gives (None where memory ran out, with the reason), and what the others show when `show` is told how
    it went. What is raised is shown before it goes on: nobody waits for this process's part."""
    result, code = None, 1
    try:
        with Attempt() as memory:
            result, code = work(), FINE
        code = NO_MEMORY if result is None else code
    except StopAsked:
        code = STOP
        raise
    except QloraError as error:
        code = error.exit_code
        raise
    finally:
        found = show(code)
    return result, found, memory.reason


def divided(joint: Joint, items: Sequence[Item], work: Callable[[Item], Tensor], ends: Ends) -> list[Tensor]:
    """`Division.shared` of this process's part; every process calls it with the same items."""
    size, rank = joint.place.size, joint.place.rank
    own: dict[int, Tensor] = {}
    for start in range(0, len(items), ROUND * size):
        numbers = range(start + rank, min(start + ROUND * size, len(items)), size)
        part = joint.gathers.shared(partial(_part, items, numbers, work))
        done, codes, reason = shown(part, partial(_codes, joint))
        if done is None or worst(codes)[1] != FINE:
            ends(codes, reason)
        own |= done or {}
    return _collected(joint, own, len(items))


def _part(items: Sequence[Item], numbers: Sequence[int], work: Callable[[Item], Tensor]) -> dict[int, Tensor]:
    done = {number: work(items[number]) for number in numbers}
    return {number: one.detach().to("cpu", torch.float64).flatten() for number, one in done.items()}


def _codes(joint: Joint, code: int) -> list[int]:
    codes = torch.zeros(joint.place.size, dtype=torch.int64)
    codes[joint.place.rank] = code
    joint.largest(codes)
    return [int(one) for one in codes]


def _collected(joint: Joint, own: dict[int, Tensor], count: int) -> list[Tensor]:
    lengths = torch.zeros(count, dtype=torch.int64)
    for number, one in own.items():
        lengths[number] = one.numel()
    joint.collect(lengths)
    values = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    ends = [0, *lengths.cumsum(0).tolist()]
    places = [values[start:end] for start, end in pairwise(ends)]
    for number, one in own.items():
        places[number].copy_(one)
    joint.collect(values.view(torch.int64))
    return places
