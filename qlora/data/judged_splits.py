"""Answers to be compared, from rows of a split to a micro-batch: who belongs to whom, and what the reference says.

A pair is one unit: it is drawn, packed and put into a micro-batch as a whole. Its sides share a row of tensors where
both have room in one, and packing is on; else each has its own, in the same micro-batch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from qlora.data.chat import TokenRow
from qlora.data.packing import pack
from qlora.data.token_cache import Preference, PreparedSplit

if TYPE_CHECKING:
    from qlora.recipe.sections import DataSection

Pack = tuple[int, ...]


class Judgements(TypedDict, total=False):
    answer_T: torch.Tensor
    signs_R: torch.Tensor
    reference_R: torch.Tensor
    paired: bool


def unit_size(split: PreparedSplit) -> int:
    """Rows that are drawn together."""
    return 2 if split.preference is not None and split.preference.paired else 1


def unit(split: PreparedSplit, row: int) -> Pack:
    """The rows that are drawn with this one, the first of them."""
    return tuple(range(row, row + unit_size(split)))


def packs_of(split: PreparedSplit, firsts: Sequence[int], max_length: int) -> list[Pack]:
    """Units, known by their first rows, in packs of up to `max_length` tokens; one that is over it is by itself."""
    if unit_size(split) == 1:
        packs = pack([split.lengths[row] for row in firsts], max_length)
        return [tuple(firsts[at] for at in members) for members in packs]
    units = [unit(split, row) for row in firsts]
    lengths = [sum(split.lengths[row] for row in rows) for rows in units]
    fitting = [at for at, length in enumerate(lengths) if length <= max_length]
    packs = [
        tuple(row for at in members for row in units[fitting[at]])
        for members in pack([lengths[at] for at in fitting], max_length)
    ]
    return packs + [rows for rows, length in zip(units, lengths, strict=True) if length > max_length]


def apart(split: PreparedSplit, packs: Iterable[Pack], max_length: int) -> list[Pack]:
    """The rows of tensors that packs become: the sides of a pair each in its own where they may not share one."""
    if split.preference is None or not split.preference.paired:
        return list(packs)
    rows: list[Pack] = []
    for members in packs:
        fits = split.preference.together and sum(split.lengths[row] for row in members) <= max_length
        rows += [members] if fits else [(row,) for row in members]
    return rows


def most_rows(split: PreparedSplit, data: DataSection) -> int:
    """Rows of tensors that a pack may become."""
    if unit_size(split) == 1:
        return 1
    pairs = (split.lengths[row] + split.lengths[row + 1] for row in range(0, len(split.lengths), 2))
    return 1 if data.packing and all(length <= data.max_length for length in pairs) else 2


def judgements(
    split: PreparedSplit, packs: Sequence[Pack], documents_BS: torch.Tensor, signed_BS: torch.Tensor
) -> Judgements:
    """What the objective knows of a micro-batch's answers; nothing of supervised rows. `signed_BS` are its weights as
    the split has them, whose signs say how good an answer is."""
    if split.preference is None:
        return {}
    rows, given = [row for members in packs for row in members], split.preference.reference
    firsts_B1 = torch.tensor([0, *accumulate(len(members) for members in packs)][:-1])[:, None]
    signed_N = signed_BS.flatten()
    trained_N = signed_N != 0
    answer_T = (documents_BS + firsts_B1).flatten()[trained_N]
    signs_R = torch.zeros(len(rows))
    signs_R[answer_T] = signed_N[trained_N].sign()
    reference_R = torch.zeros(len(rows)) if given is None else torch.tensor([float(given[row]) for row in rows])
    paired = split.preference.paired
    return {"answer_T": answer_T, "signs_R": signs_R, "reference_R": reference_R, "paired": paired}


def with_packing(split: PreparedSplit, packing: bool) -> PreparedSplit:
    """The split, whose pairs share rows of tensors or not."""
    known = split.preference
    return split if known is None else replace(split, preference=known._replace(together=packing))


def others(split: PreparedSplit, packs: Sequence[Pack], max_length: int) -> list[tuple[PreparedSplit, list[Pack]]]:
    """The mismatched answers to the questions of these packs: a split of their own, and a pack each."""
    if split.preference is None or (other := split.preference.others) is None:
        return []
    rows, together = [row for members in packs for row in members], split.preference.together
    members = pack([other.lengths[row] for row in rows], max_length) if together else [(at,) for at in range(len(rows))]
    return [(other, [tuple(rows[at] for at in one)]) for one in members]


def mismatched(split: PreparedSplit) -> PreparedSplit:
    """Row r is the question of row r with the answer of the next row that has another question, cut where that is
    longer than all rows are. Of rows that all have one question, the next row's answer."""
    begins = [next(at for at, weight in enumerate(row.loss_weights) if weight) for row in split.rows]
    asked = (array("q", row.input_ids[:at]).tobytes() for row, at in zip(split.rows, begins, strict=True))
    questions = [hashlib.sha256(question).digest() for question in asked]
    count = len(questions)
    answers = [(row + 1) % count for row in range(count)]
    for row in reversed(range(2 * count)):  # twice: the last rows look on from the first one
        row, following = row % count, (row + 1) % count
        if questions[following] == questions[row] and questions[answers[following]] != questions[row]:
            answers[row] = answers[following]
    longest = max(split.lengths)
    lengths = [min(longest, begins[row] + split.lengths[at] - begins[at]) for row, at in enumerate(answers)]
    trained = [length - begin for length, begin in zip(lengths, begins, strict=True)]
    rows = _Mismatched(split.rows, begins, answers, longest)
    return PreparedSplit(rows, lengths, trained, split.wheres, split.sources, preference=Preference(False, True))


@dataclass(frozen=True)
class _Mismatched(Sequence[TokenRow]):
    rows: Sequence[TokenRow]
    begins: Sequence[int]  # where the answer of a row begins: at its first trained token
    answers: Sequence[int]  # whose answer a row gets
    longest: int

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        begin, other = self.begins[row], self.answers[row]
        asked, answered, start = self.rows[row], self.rows[other], self.begins[other]
        ids = [*asked.input_ids[:begin], *answered.input_ids[start:]]
        weights = [*[0.0] * begin, *map(abs, answered.loss_weights[start:])]
        return TokenRow(ids[: self.longest], weights[: self.longest])
