"""Who of several processes computes which packs of a step: by how fast each is, and by what each can hold at once.

A step's packs are cut into units, the micro-batches of the process that holds least. Units are dealt the largest first,
each to the process that would be done with it earliest (Graham 1969, "Bounds on multiprocessing timing anomalies",
SIAM J. Appl. Math. 17: at most 4/3 of the best), and a process that holds several units computes several of its own at
once. Equal processes and equal packs come out as micro-batch j for process j mod N.

Which process computes a micro-batch changes the order in which gradients are summed, and so last digits, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from qlora.foreign_json import ForeignModel

FASTEST = 1000  # speeds are thousandths of the fastest process's: whole numbers, alike in all processes
MOST = 2**53

_Speeds = Annotated[tuple[Annotated[int, Field(ge=1, le=FASTEST)], ...], Field(strict=False, max_length=4096)]
_Counts = Annotated[tuple[Annotated[int, Field(ge=0, le=MOST)], ...], Field(strict=False, max_length=4096)]
_Names = Annotated[
    tuple[Annotated[str, Field(max_length=200)], ...], Field(strict=False, min_length=1, max_length=4096)
]


class Shares(ForeignModel):
    """How the packs of a run's steps are shared by its processes; a value a process in each tuple.

    rows        of each process's micro-batches
    speeds      tokens a second, as thousandths of the fastest's
    cards       what each computes with
    work, took  tokens with padding, and microseconds for them, of the steps that were measured so far
    settled     no step is measured any more
    in_turn     micro-batch j is for process j mod N, however long it is: of runs that began before this was known
    """

    rows: Annotated[tuple[Annotated[int, Field(ge=1, le=MOST)], ...], Field(strict=False, max_length=4096)]
    speeds: _Speeds
    cards: _Names
    work: _Counts = ()
    took: _Counts = ()
    settled: bool = True
    in_turn: bool = False


@dataclass(frozen=True)
class Cut:
    """A step's micro-batches: of each the places of its packs among the step's, how many rows its tensors have where
    it is a full one, and the process that computes it."""

    parts: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    owners: tuple[int, ...]

    def work_of(self, lengths: Sequence[int], count: int) -> tuple[int, ...]:
        """Tokens, with padding, that each of `count` processes computes; `lengths` are those of the packs."""
        found = [0] * count
        for part, owner in zip(self.parts, self.owners, strict=True):
            found[owner] += _cost(part, lengths)
        return tuple(found)


def in_order(packs: int, rows: int) -> Cut:
    """The micro-batches of `rows` packs that one process computes in their order."""
    parts = tuple(tuple(range(start, min(packs, start + rows))) for start in range(0, packs, rows))
    return Cut(parts, (rows,) * len(parts), (0,) * len(parts))


def dealt(lengths: Sequence[int], shares: Shares) -> Cut:
    """A step's packs of so many tokens, dealt: a function of its arguments, alike in all processes.

    Micro-batches are numbered by their first pack. Where all have the same rows they are those of one process, with the
    same numbers, from which dropout and noise follow.
    """
    unit = min(shares.rows)
    units = in_order(len(lengths), unit).parts
    given = _turns(len(units), len(shares.rows)) if shares.in_turn else _earliest(units, lengths, shares.speeds)
    parts = []
    for process, rows in enumerate(shares.rows):
        own, at_once = [one for one, owner in zip(units, given, strict=True) if owner == process], rows // unit
        for start in range(0, len(own), at_once):
            parts.append((sum(own[start : start + at_once], ()), at_once * unit, process))
    parts.sort()
    return Cut(*(tuple(column) for column in zip(*parts, strict=True))) if parts else Cut((), (), ())


def _turns(units: int, count: int) -> list[int]:
    return [number % count for number in range(units)]


def _earliest(units: Sequence[Sequence[int]], lengths: Sequence[int], speeds: Sequence[int]) -> list[int]:
    costs = [_cost(unit, lengths) for unit in units]
    load, owners = [0] * len(speeds), [0] * len(units)
    for number in sorted(range(len(units)), key=lambda number: (-costs[number], number)):
        ends = [(had + costs[number]) / speed for had, speed in zip(load, speeds, strict=True)]
        owners[number] = ends.index(min(ends))
        load[owners[number]] += costs[number]
    return owners


def _cost(part: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a micro-batch whose rows are all as long as its longest."""
    return len(part) * max(max((lengths[place] for place in part), default=0), 1)


def relative(speeds: Sequence[float]) -> tuple[int, ...]:
    """As thousandths of the fastest; of processes whose speed is not known (0) nothing tells them from the fastest."""
    most = max(speeds, default=0.0)
    return tuple(max(1, round(FASTEST * speed / most)) if speed > 0 else FASTEST for speed in speeds)
