"""The fastest settings that fit: micro-batch, layers recomputed, and what may wait on the host.

Three simulations say what a row takes and what recomputing saves, in bytes and in seconds; lines through them and the
levers' guesses rank every combination, and the simulation decides in that order. So few are asked: `MOST_TRIED`
combinations of rows and levers, each with all layers recomputed, with none, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from qlora.memory.changes import changed, halved, mildest, value_of
from qlora.memory.estimate import Estimate
from qlora.memory.levers import EMBEDDING, HEAD, OFFLOAD, SHARD, STREAM, Lever, Saving, go_together
from qlora.model.weight_receiving import Place
from qlora.recipe.reading import Recipe
from qlora.units import gib

LARGEST_MICRO_BATCH = 16
MOST_SIMULATIONS = 9  # of one search: the first, and eight more
ROWS, RECOMPUTE = "train.micro_batch_size", "train.gradient_checkpointing"
# Of a step without a card to predict it of: forward and backward pass, and what recomputing adds.
_PLAIN_SECONDS, _RECOMPUTED_SECONDS = 3.0, 4.0


@dataclass(frozen=True)
class Found:
    """Settings with their estimate."""

    recipe: Recipe
    estimate: Estimate


@dataclass(frozen=True)
class _Candidate:
    """`count` layers of all are recomputed, by the lines; `seconds` a row likewise."""

    rows: int
    levers: tuple[Lever, ...]
    count: int
    seconds: float

    @property
    def order(self) -> tuple[float, int, int, int]:
        """Of two that are as fast: the one with fewer levers, fewer layers recomputed, larger micro-batches."""
        return (round(self.seconds, 9), len(self.levers), self.count, -self.rows)


@dataclass
class Search:
    """Of one recipe. `ask` gives estimates, `layers` are those that are recomputed one by one, `open_levers` what may
    be decided, `most_rows` the largest micro-batch that a step has rows for."""

    ask: Callable[[Recipe], Estimate]
    recipe: Recipe
    layers: int
    open_levers: tuple[Lever, ...]
    most_rows: int
    lines: Lines | None = None  # once they were needed
    simulated: set[Any] = field(default_factory=set)

    def fitting(self, most: int = 1) -> list[Found]:
        """Up to `most` that fit, of different rows or levers, the fastest by the lines first; [] where none does."""
        rows, recompute = self.recipe.train.micro_batch_size, self.recipe.train.gradient_checkpointing
        first = 1 if rows == "auto" else rows
        if rows != "auto" and recompute in ("auto", False) and (plain := self._asked(first, (), 0)).estimate.fits:
            return [plain]
        found: list[Found] = []
        for candidate in sorted(self._candidates(first), key=lambda one: one.order):
            enough = len(found) >= most and min(map(_seconds_a_row, found)) <= candidate.seconds
            if len(self.simulated) >= MOST_SIMULATIONS or enough:
                break
            if (settled := self._settled(candidate)) is not None:
                found.append(settled)
        return _worth(sorted(found, key=_seconds_a_row))[:most]

    def smallest(self) -> Found:
        """Everything done to need little: what is told where nothing fits."""
        rows = self.recipe.train.micro_batch_size
        streams = any(lever.key == STREAM for lever in self.open_levers)  # which leaves least on the card
        levers = tuple(lever for lever in self.open_levers if lever.key != SHARD or not streams)
        return self._asked(1 if rows == "auto" else rows, levers, self.layers)

    # --- what is likely -----------------------------------------------------------------------------------------------

    def _candidates(self, first: int) -> Iterator[_Candidate]:
        """All combinations that fit by the lines."""
        lines = self.lines = self._lines(first)
        sizes = [first] if self.recipe.train.micro_batch_size != "auto" else [1, *halved(2 * LARGEST_MICRO_BATCH, 2)]
        for rows in sizes:
            for number in range(len(self.open_levers) + 1):
                for levers in filter(go_together, combinations(self.open_levers, number)):
                    if rows <= self.most_rows and (candidate := lines.candidate(rows, levers)) is not None:
                        yield candidate

    def _lines(self, first: int) -> Lines:
        recompute = self.recipe.train.gradient_checkpointing
        fixed = recompute if recompute != "auto" else None
        none = self._asked(first, (), 0).estimate if fixed in (None, False) else None
        every = self._asked(first, (), self.layers).estimate if fixed is not False else none
        assert every is not None
        two = self._asked(2, (), self.layers if none is not every else 0).estimate if self._grows(first) else None
        return Lines(none if none is not None else every, every, two, self.layers, fixed is None)

    def _grows(self, first: int) -> bool:
        return self.recipe.train.micro_batch_size == "auto" and first == 1 and self.most_rows > 1

    # --- what is ------------------------------------------------------------------------------------------------------

    def _settled(self, candidate: _Candidate) -> Found | None:
        """With no more layers recomputed than it needs; None where it does not fit at all."""
        rows, levers = candidate.rows, candidate.levers
        if self.recipe.train.gradient_checkpointing != "auto":
            found = self._asked(rows, levers, self.layers)
            return found if found.estimate.fits else None
        if candidate.count == 0 and (found := self._asked(rows, levers, 0)).estimate.fits:
            return found
        every = self._asked(rows, levers, self.layers)
        if not every.estimate.fits or candidate.count >= self.layers:
            return every if every.estimate.fits else None
        return mildest(range(1, self.layers), lambda count: self._if_it_fits(rows, levers, count)) or every

    def _if_it_fits(self, rows: int, levers: tuple[Lever, ...], count: int) -> Found | None:
        found = self._asked(rows, levers, count)
        return found if found.estimate.fits else None

    def _asked(self, rows: int, levers: tuple[Lever, ...], count: int) -> Found:
        recipe = changed(self.recipe, {ROWS: rows})
        recipe = changed(recipe, {one.key: one.on for one in levers})  # "auto" is off
        if self.recipe.train.gradient_checkpointing == "auto":
            setting: bool | int = count if 0 < count < self.layers else count > 0
            recipe = changed(recipe, {RECOMPUTE: setting})
        keys = tuple(lever.key for lever in levers)
        parts = (0, self.layers) if 0 < count < self.layers else (count,)  # a part is put together from both
        self.simulated |= {(rows, keys, part) for part in parts}
        return Found(recipe, self.ask(recipe))


@dataclass(frozen=True)
class Lines:
    """What is likely of any combination: by estimates of the smallest micro-batch, with no layer recomputed and with
    all, and of one row more.

    `divides`: the number of layers is open; else `none` and `every` are the same.
    """

    none: Estimate
    every: Estimate
    two: Estimate | None
    layers: int
    divides: bool

    def candidate(self, rows: int, levers: Sequence[Lever]) -> _Candidate | None:
        times = rows if self.two is not None else 1
        a_row = max(0, self.two.needed_bytes - self.every.needed_bytes) if self.two is not None else 0
        savings = [self.saving(lever, times) for lever in levers]
        keys = {lever.key for lever in levers}
        savings += [self.of_head()] if EMBEDDING in keys and keys & {STREAM, SHARD} else []
        room = self.every.limit_bytes - self.every.needed_bytes - (times - 1) * a_row
        room += sum(one.nbytes for one in savings)
        if room < 0:
            return None
        count = self.layers
        if self.divides and not any(lever.whole for lever in levers):
            gaps, kept = self._kept(times)
            if gaps <= room:  # what is left over is for layers that keep what they compute
                count = max(0, self.layers - (room - gaps) * self.layers // max(1, kept))
        if count == 0 and any(lever.key == OFFLOAD for lever in levers):
            return None  # nothing waits for the backward pass but what it needs at once
        return _Candidate(rows, tuple(levers), count, self._seconds(times, count, savings) / rows)

    def _kept(self, rows: int) -> tuple[int, int]:
        """What keeping takes: gaps between blocks, which one layer is enough for, and what all layers keep."""
        gaps = self.none.terms.get("fragmentation", 0) - self.every.terms.get("fragmentation", 0)
        both = max(0, self.none.needed_bytes - self.every.needed_bytes)
        gaps = min(both, max(0, gaps))
        return rows * gaps, rows * (both - gaps)

    def saving(self, lever: Lever, rows: int) -> Saving:
        known = self.every.savings.get(lever.key, Saving(0, False))
        if not known.by_rows:
            return known
        up, down = known.beside
        return Saving(known.nbytes * rows, True, (up * rows, down * rows), known.alone * rows)

    def of_head(self) -> Saving:
        """What embeddings and layers on the host save together beside what each saves."""
        return self.every.savings.get(HEAD, Saving(0, False))

    def _seconds(self, rows: int, count: int, savings: Sequence[Saving]) -> float:
        """Of a micro-batch: on the line, with copies where they take longer than what they run beside."""
        plain, again = (_seconds(one, base) for one, base in zip((self.none, self.every), _WITHOUT, strict=True))
        grown = again * rows
        if self.two is not None:
            grown = again + (rows - 1) * (_seconds(self.two, 2 * _RECOMPUTED_SECONDS) - again)
        without = grown * plain / again
        seconds = without + (grown - without) * count / self.layers
        up = seconds / (3 + count / self.layers)  # a third of a step is the forward pass, and recomputing one more
        waits = [max(0.0, sum(one.beside[way] for one in savings) - part) for way, part in ((0, up), (1, seconds - up))]
        return seconds + sum(waits) + sum(one.alone for one in savings)


def _worth(found: Sequence[Found]) -> list[Found]:
    """Of plans, the fastest first, all but those that are slower than another and need no less."""
    kept: list[Found] = []
    for one in found:
        faster = [other for other in kept if _seconds_a_row(other) < _seconds_a_row(one)]
        if all(other.estimate.needed_bytes > one.estimate.needed_bytes for other in faster):
            kept.append(one)
    return kept


def _seconds_a_row(found: Found) -> float:
    """As predicted; without a card to predict it of, whatever was found first."""
    return _seconds(found.estimate, 0.0) / float(found.estimate.settings[ROWS])


_WITHOUT = (_PLAIN_SECONDS, _RECOMPUTED_SECONDS)


def _seconds(estimate: Estimate, without_a_card: float) -> float:
    """Of its micro-batch; without a card to predict it of, in units of a third of a step."""
    speed: float = estimate.tokens_per_second
    rows: int = estimate.settings[ROWS]
    return rows * float(estimate.settings.get("data.max_length", 1)) / speed if speed else without_a_card


def reasons(search: Search, found: Found) -> dict[str, str]:
    """Why each open key has the value that it has."""
    said, recipe, estimate = dict[str, str](), found.recipe, found.estimate
    left, lines = estimate.limit_bytes - estimate.needed_bytes, search.lines
    if search.recipe.train.gradient_checkpointing == "auto":
        said[RECOMPUTE] = _why_recomputed(search, found)
    if search.recipe.train.micro_batch_size == "auto":
        said[ROWS] = f"of those that fit, predicted to be the fastest: {_speed(estimate)}"
        if lines is not None and lines.every.tokens_per_second and recipe.train.micro_batch_size != 1:
            said[ROWS] += f"; one row with every layer recomputed {_speed(lines.every)}"
    for lever in search.open_levers:
        if value_of(recipe, lever.key) != lever.on:
            said[lever.key] = "it fits without" if estimate.fits else "it saves nothing here"
            continue
        rows = int(estimate.settings[ROWS]) if lines is not None and lines.two is not None else 1
        saving = lines.saving(lever, rows) if lines is not None else Saving(0, False)
        if lines is not None and lever.key == EMBEDDING and Place.of(recipe.memory).comes_and_goes:
            saving = saving.with_head(lines.of_head())
        where = "are on the other cards" if lever.key == SHARD else "wait on the host"
        over, moved = saving.nbytes - left, f"about {gib(saving.nbytes)} {where}"
        moved += ", the head's among them, which comes in blocks" if saving.head else ""
        why = f"without that {gib(over)} would be missing" if over > 0 else "which makes room for speed"
        said[lever.key] = f"{moved}, {why}" if estimate.fits else f"{moved}, and still it does not fit"
    return said


def _why_recomputed(search: Search, found: Found) -> str:
    setting = found.recipe.train.gradient_checkpointing
    if setting is False:
        return "there is room to keep what every layer computes"
    if search.lines is None:
        return "little is needed like this"
    rows = found.estimate.settings[ROWS] if search.lines.two is not None else 1
    count = search.layers if setting is True else int(setting)
    kept = rows * (search.lines.none.needed_bytes - search.lines.every.needed_bytes) * count // search.layers
    over = kept - (found.estimate.limit_bytes - found.estimate.needed_bytes)
    if over <= 0:
        where = "other cards have" if value_of(found.recipe, SHARD) is True else "wait on the host"
        return f"the weights of layers that {where} are there for one pass at a time"
    return f"to keep what all layers compute about {gib(over)} would be missing"


def _speed(estimate: Estimate) -> str:
    return f"{estimate.tokens_per_second:,.0f} tokens/s" if estimate.tokens_per_second else "no speed is known"
