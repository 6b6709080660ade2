"""Rows that are nearly the same: told by MinHash, proven pair by pair, at a bounded cost.

A row is the set of its runs of 5 tokens, behind the beginning that many rows share (a system prompt, a template's
frame). Rows whose sets are equal in one of 8 bands of 3 MinHashes (Broder 1997; bands: Leskovec, Rajaraman, Ullman,
chapter 3.4) are compared themselves, and are alike from a Jaccard index of 0.8 on. Of such pairs the bands find 99.7 %
(1 - (1 - 0.8³)⁸). The work is some 24 multiplications a token; no pair is looked at because there are many rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from qlora.data.token_cache import FlatRows, PreparedSplit
from qlora.data.xray.tokens import BATCH_ROWS, runs

RUN = 5
ALIKE = 0.8
BANDS, IN_BAND = 8, 3
MAX_ROWS = 1_000_000  # are compared, the first of a split
MAX_PAIRS = 20_000  # are proven: a few seconds
# Rows that begin with the same OPENING tokens, so many of them and such a part of all, are looked at for what they
# share: the tokens that SHARED of them begin with.
OPENING = 16
FEWEST, SHARE = 8, 0.01
SHARED, SAMPLED = 0.9, 200


@dataclass(frozen=True)
class Alike:
    """Pairs (row, an earlier row that is nearly the same), a row at most once; `compared` rows were looked at.

    `whole`: every pair that looked alike was compared; else there may be more.
    """

    pairs: tuple[tuple[int, int], ...]
    compared: int
    whole: bool


def find(split: PreparedSplit, leave_out: Any) -> Alike:
    """Rows of a split that are nearly the same as an earlier one. `leave_out`: rows that are copies to the token."""
    count = min(len(split.lengths), MAX_ROWS)
    skipped = numpy.zeros(len(split.lengths), bool)
    skipped[leave_out] = True
    rows = numpy.flatnonzero(~skipped[:count])
    if len(rows) < 2:
        return Alike((), count, True)
    frames = _frames(split, rows)
    found = [_signatures(batch, skipped, frames) for batch in split.flat(BATCH_ROWS) if batch.first < count]
    numbers = numpy.concatenate([numbers for numbers, _ in found])
    bands = numpy.concatenate([bands for _, bands in found])
    pairs = _candidates(numbers[numbers < count], bands[numbers < count])
    alike: dict[int, int] = {}
    for earlier, later in pairs[:MAX_PAIRS].tolist():
        if later not in alike and _jaccard(split, earlier, later, frames) >= ALIKE:
            alike[later] = earlier
    return Alike(tuple(sorted(alike.items())), count, len(pairs) <= MAX_PAIRS)


def _frames(split: PreparedSplit, rows: Any) -> Any:
    """Tokens at the beginning of each row that many rows share, int64[rows of the split]."""
    openings = numpy.zeros(len(split.lengths), numpy.uint64)
    for batch in split.flat(BATCH_ROWS):
        long = numpy.flatnonzero(numpy.diff(batch.starts) > OPENING)
        if len(long):
            openings[batch.first + long] = runs(batch.ids, OPENING)[batch.starts[long]]
    frames = numpy.zeros(len(split.lengths), numpy.int64)
    keys, counts = numpy.unique(openings[rows], return_counts=True)
    for key in keys[(counts >= max(FEWEST, SHARE * len(rows))) & (keys != 0)]:
        members = rows[openings[rows] == key]
        frames[members] = _shared(split, members[:: -(-len(members) // SAMPLED)].tolist())
    return frames


def _shared(split: PreparedSplit, sampled: Sequence[int]) -> int:
    """The tokens that all but a few of these rows begin with."""
    beginnings = [split.rows[row].input_ids for row in sampled]
    length = 0
    while True:
        here = Counter(ids[length] for ids in beginnings if length < len(ids))
        token, count = here.most_common(1)[0] if here else (0, 0)
        if count < SHARED * len(sampled):
            return length
        beginnings = [ids for ids in beginnings if length < len(ids) and ids[length] == token]
        length += 1


def _signatures(batch: FlatRows, skipped: Any, frames: Any) -> tuple[Any, Any]:
    """(numbers of the rows that have a run of tokens, their bands uint64[rows, BANDS])."""
    found = runs(batch.ids, RUN)
    row_of = numpy.repeat(numpy.arange(len(batch.starts) - 1), numpy.diff(batch.starts))[: len(found)]
    places = numpy.arange(len(found))
    kept = (places + RUN <= batch.starts[1:][row_of]) & ~skipped[batch.first + row_of]
    kept &= places >= batch.starts[:-1][row_of] + frames[batch.first + row_of]
    found, row_of = found[kept], row_of[kept]
    if not len(found):
        return numpy.zeros(0, numpy.int64), numpy.zeros((0, BANDS), numpy.uint64)
    begins = numpy.flatnonzero(numpy.diff(row_of, prepend=-1))
    bands = numpy.zeros((len(begins), BANDS), numpy.uint64)
    for number, (factor, summand) in enumerate(_permutations()):
        mixed = found * factor + summand
        lowest = numpy.minimum.reduceat(mixed ^ (mixed >> numpy.uint64(32)), begins)
        band = number // IN_BAND
        bands[:, band] = (bands[:, band] ^ lowest) * numpy.uint64(0xBF58476D1CE4E5B9)
    return batch.first + row_of[begins], bands


def _permutations() -> Iterator[tuple[Any, Any]]:
    generator = numpy.random.Generator(numpy.random.PCG64(0))
    for factor, summand in generator.integers(1, 1 << 63, (BANDS * IN_BAND, 2), dtype=numpy.uint64):
        yield factor | numpy.uint64(1), summand


def _candidates(numbers: Any, bands: Any) -> Any:
    """Pairs (earlier, later) that share a band, int64[pairs, 2], those that share more of them first.

    In a band each row is paired with the first of its kind and with the one before it: a thousand copies make two
    thousand pairs, and no million.
    """
    pairs = []
    for band in range(bands.shape[1]):
        order = numpy.argsort(bands[:, band], kind="stable")
        keys, rows = bands[order, band], numbers[order]
        same = numpy.flatnonzero(keys[1:] == keys[:-1]) + 1
        firsts = numpy.flatnonzero(numpy.concatenate([[True], keys[1:] != keys[:-1]]))
        first_of = rows[firsts[numpy.searchsorted(firsts, same, side="right") - 1]]
        pairs += [numpy.stack([first_of, rows[same]], 1), numpy.stack([rows[same - 1], rows[same]], 1)]
    every, counts = numpy.unique(numpy.concatenate(pairs), axis=0, return_counts=True)
    return every[numpy.argsort(-counts, kind="stable")]


def _jaccard(split: PreparedSplit, one: int, other: int, frames: Any) -> float:
    first, second = (
        numpy.unique(runs(numpy.asarray(split.rows[row].input_ids[frames[row] :]), RUN)) for row in (one, other)
    )
    shared = len(numpy.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)
