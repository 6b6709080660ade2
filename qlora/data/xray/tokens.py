"""One walk over every token of a split: what each row trains, begins and ends with, and hashes to compare it by.

A million rows pass by in batches of numpy arrays, and some 50 bytes are kept of each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from qlora.data.token_cache import FlatRows, PreparedSplit

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer

BATCH_ROWS = 1024
_ODD = 0x9E3779B97F4A7C15  # 2⁶⁴ divided by the golden ratio: Knuth, volume 3, section 6.4
_HASH_BYTES = 8  # two of a million rows collide by chance once in 30 million sets (birthday bound, n² / 2⁶⁵)


@dataclass(frozen=True)
class Ids:
    """Tokens that mean something: `bos` (None: the tokenizer has none) and what may end an answer or a text."""

    bos: int | None
    ends: tuple[int, ...]

    @classmethod
    def of(cls, chat: ChatTokenizer) -> Ids:
        eos = chat.tokenizer.eos_token_id
        return cls(chat.tokenizer.bos_token_id, (*chat.end_token_ids, *([] if eos is None else [eos])))


@dataclass(frozen=True)
class RowFacts:
    """Arrays with one value a row.

    ended      whether its last trained token is one that ends an answer
    bos        tokens at its beginning that are BOS
    rows       hash of all its tokens
    questions  hash of the tokens before its last answer; 0 where every token is trained
    answers    hash of the tokens of its last answer, its end token left out
    starts     place of the first token of its last answer
    stops      and of the one behind its last, the end token left out
    """

    ended: Any
    bos: Any
    rows: Any
    questions: Any
    answers: Any
    starts: Any
    stops: Any


def look(split: PreparedSplit, ids: Ids) -> tuple[RowFacts, Any]:
    """Facts of each row, and the sorted distinct hashes of all the answers that are trained."""
    count = len(split.lengths)
    ended, bos = numpy.zeros(count, bool), numpy.zeros(count, numpy.int32)
    hashes = numpy.zeros((3, count), numpy.uint64)
    starts, stops = numpy.zeros((2, count), numpy.int64)
    known: set[int] = set()
    for batch in split.flat(BATCH_ROWS):
        trained, ends = batch.weights != 0, numpy.isin(batch.ids, ids.ends)
        for row, (begin, stop) in enumerate(zip(batch.starts[:-1], batch.starts[1:], strict=True)):
            at = batch.first + row
            answers = _answers(trained[begin:stop]) or [(0, int(stop - begin))]
            first, last = answers[-1]
            hashes[0, at] = _hash(batch.ids[begin:stop])
            hashes[1, at] = _hash(batch.ids[begin : begin + first]) if first > 1 else 0
            for start, end in answers:
                stops[at] = end - int(ends[begin + end - 1])
                found = _hash(batch.ids[begin + start : begin + stops[at]])
                known.add(found)
            hashes[2, at], starts[at], ended[at] = found, first, ends[begin + last - 1]
            bos[at] = _leading(batch, begin, stop, ids.bos)
    facts = RowFacts(ended, bos, hashes[0], hashes[1], hashes[2], starts, stops)
    return facts, numpy.fromiter(sorted(known), numpy.uint64, len(known))


def _answers(trained: Any) -> list[tuple[int, int]]:
    """Runs of trained tokens, each from its first to behind its last."""
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate([[False], trained, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _leading(batch: FlatRows, begin: int, stop: int, bos: int | None) -> int:
    count = 0
    while bos is not None and begin + count < stop and batch.ids[begin + count] == bos:
        count += 1
    return count


def _hash(ids: Any) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=_HASH_BYTES).digest()) or 1


def runs(ids: Any, length: int) -> Any:
    """A hash of each run of `length` tokens, uint64[tokens - length + 1]."""
    made = numpy.zeros(max(len(ids) - length + 1, 0), numpy.uint64)
    for place in range(length):
        made = (made ^ ids[place : place + len(made)].astype(numpy.uint64)) * numpy.uint64(_ODD)
        made ^= made >> numpy.uint64(29)
    return made


def copies(hashes: Any) -> tuple[Any, Any]:
    """(row, the first row with its hash) for each row whose hash an earlier row has; a hash of 0 is none."""
    _, first, inverse = numpy.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    again = numpy.flatnonzero((original != numpy.arange(len(hashes))) & (hashes != 0))
    return again, original[again]
