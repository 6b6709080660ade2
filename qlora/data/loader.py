"""The order of rows, as a pure function of (seed, epoch, step), and micro-batches of tensors.

Nothing here has a state to save: step 1,000 of a resumed run is computed, not reached. Chance comes from sha256 of
(seed, epoch, purpose), never from a global generator.
"""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import torch

from qlora.batch import Batch
from qlora.data import judged_splits, label_rows
from qlora.data.layout import ON_CPU, Layout, documents_of
from qlora.data.token_cache import PreparedSplit

if TYPE_CHECKING:
    from qlora.recipe.sections import DataSection

T = TypeVar("T")

_KEPT_EPOCHS = 2  # packs of this many epochs stay in memory: of the one that runs, and of one that a caller asks about


class TrainOrder:
    """Which packs each optimizer step trains. A pack is a tuple of row indices; without packing it holds one row.

    A step takes `batch_size` packs. Steps never mix epochs: the last step of an epoch may have fewer packs.
    """

    def __init__(self, split: PreparedSplit, data: DataSection, seed: int, batch_size: int) -> None:
        self._split = split
        self._data = data
        self._seed = seed
        self._batch_size = batch_size
        self._first_steps = [0]  # of each epoch looked at so far, and of the one after
        self._packs = lru_cache(_KEPT_EPOCHS)(self._make_packs)

    def epoch_packs(self, epoch: int) -> list[tuple[int, ...]]:
        """Every pack of an epoch (from 0), in the order in which they are trained."""
        return self._packs(epoch)

    def steps_in_epoch(self, epoch: int) -> int:
        return self._first_step(epoch + 1) - self._first_step(epoch)

    def packs_of_step(self, step: int) -> list[tuple[int, ...]]:
        """The packs of a step, counted from 0 over all epochs."""
        epoch = self._epoch(step)
        start = (step - self._first_step(epoch)) * self._batch_size
        return self.epoch_packs(epoch)[start : start + self._batch_size]

    def epoch_of_step(self, step: int) -> float:
        """Epochs done when `step` begins: 1.5 is the middle of the second."""
        epoch = self._epoch(step)
        return epoch + (step - self._first_step(epoch)) / self.steps_in_epoch(epoch)

    def steps(self, epochs: float) -> int:
        """Steps in that many epochs; a part of an epoch is rounded up to whole steps. At least 1."""
        whole = math.floor(epochs)
        part = epochs - whole
        steps = self._first_step(whole) + (math.ceil(part * self.steps_in_epoch(whole) - 1e-9) if part else 0)
        return max(1, steps)

    def _epoch(self, step: int) -> int:
        while self._first_steps[-1] <= step:
            self._first_step(len(self._first_steps))
        return bisect_right(self._first_steps, step) - 1

    def _first_step(self, epoch: int) -> int:
        while len(self._first_steps) <= epoch:
            packs = len(self.epoch_packs(len(self._first_steps) - 1))
            self._first_steps.append(self._first_steps[-1] + math.ceil(packs / self._batch_size))
        return self._first_steps[epoch]

    def _make_packs(self, epoch: int) -> list[tuple[int, ...]]:
        rows = _shuffled(list(self._drawn(epoch)), self._seed, epoch, "rows")
        if not self._data.packing:
            return [judged_splits.unit(self._split, row) for row in rows]
        packs = judged_splits.packs_of(self._split, rows, self._data.max_length)
        return _shuffled(packs, self._seed, epoch, "packs")

    def _drawn(self, epoch: int) -> Iterator[int]:
        """Rows (of pairs the first): of a source with weight 2.5 each row twice, and half of them once more."""
        of_source: dict[int, list[int]] = {}
        for row in range(0, len(self._split.sources), judged_splits.unit_size(self._split)):
            of_source.setdefault(self._split.sources[row], []).append(row)
        for source, rows in sorted(of_source.items()):
            times = math.floor(self._data.train[source].weight)
            part = round((self._data.train[source].weight - times) * len(rows))
            for _ in range(times):
                yield from rows
            yield from _shuffled(rows, self._seed, epoch, f"source {source}")[:part]


def eval_packs(split: PreparedSplit, data: DataSection) -> list[tuple[int, ...]]:
    """All rows to evaluate on, each once; longest first, so that what does not fit fails at once."""
    rows = range(0, len(split.lengths), judged_splits.unit_size(split))
    if data.packing:
        return judged_splits.packs_of(split, rows, data.max_length)
    units = (judged_splits.unit(split, row) for row in rows)
    return sorted(units, key=lambda unit: (-max(split.lengths[row] for row in unit), unit))


def collate(
    split: PreparedSplit, packs: Sequence[tuple[int, ...]], pad_id: int, max_length: int, layout: Layout = ON_CPU
) -> Batch:
    """One micro-batch: a row of tensors for each pack, padded to the longest, rounded up as `layout` says.

    Padding is known by its place, never by its id: it is a document of its own and its weights are 0.
    Raises ValueError when a pack is over max_length.
    """
    asked, packs = packs, judged_splits.apart(split, packs, max_length)
    longest = max(sum(split.lengths[row] for row in members) for members in packs)
    if longest > max_length:
        raise ValueError(f"a pack has {longest} tokens, over max_length = {max_length}")
    longest_document = max((split.lengths[row] for members in packs for row in members), default=1)
    width = min(max_length, math.ceil(max(longest, layout.width) / layout.multiple) * layout.multiple)
    packs = [*packs, *[()] * (layout.rows - len(packs))]
    ids_BS = torch.full((len(packs), width), pad_id, dtype=torch.int64)
    positions_BS, documents_BS, targets_BS = (torch.zeros_like(ids_BS) for _ in range(3))
    weights_BS = torch.zeros(ids_BS.shape, dtype=torch.float32)
    for number, members in enumerate(packs):
        start = 0
        for document, row in enumerate(members):
            tokens = split.rows[row]
            end = start + len(tokens.input_ids)
            ids_S = torch.tensor(tokens.input_ids, dtype=torch.int64)
            ids_BS[number, start:end] = ids_S
            positions_BS[number, start:end] = torch.arange(end - start)
            documents_BS[number, start:end] = document
            targets_BS[number, start : end - 1] = ids_S[1:]
            weights_BS[number, start : end - 1] = torch.tensor(tokens.loss_weights[1:], dtype=torch.float32)
            start = end
        first = split.lengths[members[-1]] if members and layout.continues else 0
        documents_BS[number, start:] = len(members)
        padding_S = torch.arange(first, first + width - start)
        positions_BS[number, start:] = padding_S.clamp_(max=longest_document - 1) if layout.continues else padding_S
    judgements = judged_splits.judgements(split, packs, documents_BS, weights_BS)
    trained_T = weights_BS.abs_().flatten().nonzero().squeeze(1)
    made = (ids_BS, positions_BS, documents_BS, targets_BS, weights_BS, trained_T)
    documents = documents_of([[split.lengths[row] for row in members] for members in packs], width, layout)
    others = (collate(*other, pad_id, max_length, layout) for other in judged_splits.others(split, asked, max_length))
    labels = label_rows.collated(split, packs, targets_BS.flatten()[trained_T])
    return Batch(*made, *documents, **labels, **judgements, others=tuple(others))


def _shuffled(items: list[T], seed: int, epoch: int, purpose: str) -> list[T]:
    """The items in another order, the same on every machine and version.

    Python promises the sequence of `random()` for a seed, but not that of `shuffle()`: so items are sorted by draws.
    """
    digest = hashlib.sha256(f"{seed} {epoch} {purpose}".encode()).digest()
    generator = random.Random(int.from_bytes(digest))
    draws = [generator.random() for _ in items]
    return [items[at] for at in sorted(range(len(items)), key=draws.__getitem__)]
