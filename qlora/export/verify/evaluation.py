"""The loss on the evaluation rows: as a run measures and delivers it, and once more before its adapter is exported.

Two fine-tunes of one model have the same names, shapes and sizes, so that an adapter fits both, merges into both, and
is as near to "the trained model" as that is computed from the wrong one. What it learned it shows on one of them only.
A run therefore records the loss of what it delivers, and where rows are many, that of a sample of them; an export
computes the same rows with the model that it has, and refuses one that does not know what was learned.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.data.layout import ON_CPU, Layout
from qlora.data.loader import collate, eval_packs
from qlora.data.token_cache import PreparedSplit
from qlora.errors import ExportError
from qlora.events import Notice, Sink
from qlora.export.verify.fidelity import MOST_TOKENS
from qlora.model.delivered_loss import DeliveredLoss
from qlora.model.weight_receiving import device_of
from qlora.step.forward import CausalParts, batch_loss, evaluating
from qlora.step.loss import Objective, SupervisedObjective

if TYPE_CHECKING:
    from qlora.recipe.sections import DataSection

# How far the loss may be from the delivered one, in parts of it and in nats: 1 % + 0.01. Measured on tiny runs that
# ended at 3.83 and 2.05 (81 tokens): the same machine gives the same bits, other micro-batches differ by 2e-8 of it,
# another attention kernel by 5e-4; the nearest other fine-tune, the run's own merged model, by 0.076 and 0.109.
RELATIVE, NATS = 0.01, 0.01


@dataclass(frozen=True)
class ComparedLoss:
    """The delivered loss of the evaluation rows, and that of the model which is exported, in nats; how many rows."""

    delivered: float
    here: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class EvalRows(Sequence[Batch]):
    """Evaluation rows in the micro-batches in which they are measured; each is made when it is asked for."""

    split: PreparedSplit
    section: DataSection
    pad_id: int
    packs_at_once: int
    layout: Layout = ON_CPU

    @cached_property
    def micro_batches(self) -> list[list[tuple[int, ...]]]:
        """The rows of each pack of each micro-batch, the longest first."""
        packs = eval_packs(self.split, self.section)
        return [packs[start : start + self.packs_at_once] for start in range(0, len(packs), self.packs_at_once)]

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __getitem__(self, number: Any) -> Any:  # no slices
        return collate(self.split, self.micro_batches[number], self.pad_id, self.section.max_length, self.layout)

    def sample(self, every: int) -> Iterator[Batch]:
        """The rows of every `every`-th micro-batch, each pack alone: memory may be scarcer here."""
        for pack in chain(*self.micro_batches[::every]):
            yield collate(self.split, [pack], self.pad_id, self.section.max_length, self.layout)

    def record(self, step: int, losses: Sequence[tuple[Tensor, float]]) -> DeliveredLoss | None:
        """What is delivered with the adapter of a step; `losses` are those of all micro-batches, in order.

        None where nothing is trained in the sample, or a loss is not finite.
        """
        tokens = [sum(self.split.lengths[row] for row in chain(*packs)) for packs in self.micro_batches]
        every = 1
        while every < len(tokens) and sum(tokens[::every]) > MOST_TOKENS:
            every += 1
        rows = self._rows(every)
        trained = sum(self.split.trained[row] for row in rows)
        loss, sample_loss = mean(losses), mean(losses[::every])
        if not trained or not math.isfinite(loss) or not math.isfinite(sample_loss):
            return None
        return DeliveredLoss(
            step=step,
            loss=loss,
            sample_loss=sample_loss,
            sample_rows=len(rows),
            sample_tokens=trained,
            every=every,
            packs_at_once=self.packs_at_once,
            packing=self.section.packing,
            content=self.content_sha256(every),
        )

    def content_sha256(self, every: int) -> str:
        """Of the tokens and weights of the rows in every `every`-th micro-batch, in their order."""
        content = hashlib.sha256()
        for number in self._rows(every):
            row = self.split.rows[number]
            tokens = array("q", row.input_ids).tobytes()
            content.update(len(tokens).to_bytes(8, "little") + tokens + array("f", row.loss_weights).tobytes())
        return content.hexdigest()

    def _rows(self, every: int) -> list[int]:
        return [row for packs in self.micro_batches[::every] for pack in packs for row in pack]


def summed_loss(parts: CausalParts, objective: Objective, batch: Batch, device: torch.device) -> tuple[Tensor, float]:
    """A micro-batch's summed loss, fp64 and still on the device, and what it counts in the whole."""
    weight = objective.weight(batch)
    return batch_loss(parts, batch.to(device), objective).double(), weight


def mean(losses: Sequence[tuple[Tensor, float]]) -> float:
    """The mean of summed losses over all that they count; NaN where that is nothing."""
    weight = sum(weight for _, weight in losses)
    if not weight:
        return math.nan
    total = losses[0][0].clone()
    for loss, _ in losses[1:]:
        total += loss
    return float(total) / weight


def compare(model: Any, rows: EvalRows, recorded: DeliveredLoss, sink: Sink) -> ComparedLoss | None:
    """Measure `model`, base and adapter as trained, where `recorded` was measured; None, with a notice, for other rows.

    Raises ExportError when it is not the model that the run delivered.
    """
    if recorded.content is not None and rows.content_sha256(recorded.every) != recorded.content:
        message = "the evaluation rows have changed since: their loss is not compared with the one that was delivered"
        sink.emit(Notice("verify", message))
        return None
    if recorded.content is None and sum(rows.split.lengths) > MOST_TOKENS:
        message = "an older version delivered the adapter, and recorded no loss of a sample of its many evaluation rows"
        sink.emit(Notice("verify", f"{message}: it is not compared"))
        return None
    causal_lm = model.get_base_model()
    parts, device = CausalParts.of(causal_lm), device_of(causal_lm)
    with evaluating(model):
        losses = [summed_loss(parts, SupervisedObjective(), batch, device) for batch in rows.sample(recorded.every)]
    here, there = mean(losses), recorded.sample_loss
    on = f"its loss on {recorded.sample_rows:,} evaluation rows"
    found = f"{on} is {here:.4f} nats a token, the run delivered {there:.4f}"
    if not abs(here - there) <= RELATIVE * there + NATS:
        raise ExportError(
            f"the model that is here is not the one that was trained: {found}",
            "put the base back as it was at training, and the adapter as it was delivered",
        )
    sink.emit(Notice("verify", f"the model that is exported is the one that was trained: {found}"))
    return ComparedLoss(there, here, recorded.sample_rows, recorded.sample_tokens)
