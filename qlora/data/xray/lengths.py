"""How long rows are, how full their packs, and how often they begin with BOS: counts, ready to be drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.row_cache import OVER, RowReport

BARS = 16


@dataclass(frozen=True)
class Bar:
    """`rows` of `least` to `most` tokens; `most` None: and more. `over`: these were cut, or left out."""

    least: int
    most: int | None
    rows: int
    over: bool = False


@dataclass(frozen=True)
class Packing:
    """`share` of the places in `packs` of `max_length` tokens that hold a token of a row. Off: a row each."""

    on: bool
    packs: int
    share: float


def histogram(lengths: Sequence[int], max_length: int, reports: Sequence[RowReport]) -> tuple[Bar, ...]:
    """Rows by their tokens up to `max_length`, and beyond it those that were longer before they were cut or dropped.

    A cut row stands in both, as what it was and as what is used of it.
    """
    width = -(-max_length // BARS)
    counts = Counter((length - 1) // width for length in lengths)
    bars = [Bar(at * width + 1, min((at + 1) * width, max_length), counts[at]) for at in range(-(-max_length // width))]
    over = [sum(one.over[at] for report in reports for one in report.by_source) for at in range(len(OVER) + 1)]
    edges = [max_length, *(int(times * max_length) for times in OVER), None]
    for at, rows in enumerate(over):
        least, most = edges[at], edges[at + 1]
        assert least is not None
        bars.append(Bar(least + 1, most, rows, over=True))
    return tuple(bars)


def fill_of(on: bool, packs: Sequence[Any], tokens: int, max_length: int) -> Packing:
    return Packing(on, len(packs), tokens / (len(packs) * max_length) if packs else 0.0)
