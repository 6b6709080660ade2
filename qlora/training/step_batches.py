"""The training rows as steps read them: packs, micro-batches, tensors, and how many steps that makes.

Which rows a step reads follows from its number alone. In how many pieces they go through the model is decided by
memory and may change under way: the size of a micro-batch is an argument and kept nowhere here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora.batch import Batch
from qlora.data.judged_splits import apart
from qlora.data.layout import ON_CPU, Layout
from qlora.data.loader import TrainOrder, collate
from qlora.data.prepare import PreparedSplit
from qlora.dealing import Cut
from qlora.events import Plan
from qlora.memory.plan import as_event
from qlora.recipe.sections import DataSection, TrainSection
from qlora.training import schedule
from qlora.training.memory_plan import MemorySettings

Pack = tuple[int, ...]  # rows of the split


@dataclass(frozen=True)
class StepBatches:
    """What the steps of a run read, in their order."""

    split: PreparedSplit
    data: DataSection  # of the recipe, with packing as it is really done
    pad_id: int
    batch_size: int  # packs of a step
    order: TrainOrder
    steps: int
    layout: Layout = ON_CPU

    @classmethod
    def of(
        cls, split: PreparedSplit, data: DataSection, train: TrainSection, pad_id: int, layout: Layout = ON_CPU
    ) -> StepBatches:
        """The batch size may depend on how many packs there are, so the order is made twice."""
        trial = TrainOrder(split, data, train.seed, 1)
        batch_size = schedule.auto_batch_size(len(trial.epoch_packs(0)), train)
        order = TrainOrder(split, data, train.seed, batch_size)
        steps = train.max_steps or order.steps(train.epochs or schedule.DEFAULT_EPOCHS)
        layout = layout.steady(
            [sum(split.lengths[i] for i in row) for row in apart(split, order.epoch_packs(0), data.max_length)]
        )
        return cls(split, data, pad_id, batch_size, order, steps, layout)

    def plan(self, now: MemorySettings, eval_rows: int, trainable_parameters: int, total_parameters: int) -> Plan:
        """What will happen, with the arithmetic."""
        batch, micro = self.batch_size, now.micro_batch_size
        packs = len(self.order.epoch_packs(0))
        unit = "packs" if self.data.packing else "rows"
        per_epoch = self.order.steps(1.0)
        return Plan(
            train_rows=len(self.split.lengths),
            eval_rows=eval_rows,
            packs=packs,
            tokens_per_epoch=sum(self.split.lengths),
            trained_tokens_per_epoch=sum(self.split.trained),
            batch_size=batch,
            micro_batch_size=micro,
            accumulation=math.ceil(batch / micro),
            steps=self.steps,
            epochs=self.order.epoch_of_step(self.steps),
            trainable_parameters=trainable_parameters,
            total_parameters=total_parameters,
            packing=self.data.packing,
            gradient_checkpointing=now.gradient_checkpointing,
            max_length=self.data.max_length,
            arithmetic=(
                f"{packs} {unit} an epoch ÷ {batch} a step = {per_epoch} steps an epoch; "
                f"{batch} {unit} a step = {math.ceil(batch / micro)} micro-batches of {micro}"
            ),
            memory=None if now.plan is None else as_event(now.plan),
            cards=() if now.cards is None else now.cards.as_event(batch),
        )

    def longest(self, micro_batch_size: int) -> Batch:
        """The micro-batch of the first epoch's packs with the most tokens."""
        packs = sorted(self.order.epoch_packs(0), key=lambda pack: (-self.tokens([pack]), pack))
        return self.micro_batch(packs[:micro_batch_size], micro_batch_size)

    def tokens(self, packs: Sequence[Pack]) -> int:
        return sum(self.split.lengths[row] for pack in packs for row in pack)

    def lengths(self, packs: Sequence[Pack]) -> list[int]:
        multiple, least = self.layout.multiple, self.layout.width
        return [max(least, -(-self.tokens([pack]) // multiple) * multiple) for pack in packs]  # with padding

    def in_micro_batches(self, packs: Sequence[Pack], cut: Cut) -> list[Sequence[Pack]]:
        return [[packs[place] for place in part] for part in cut.parts]

    def micro_batches(self, packs: Sequence[Pack], cut: Cut) -> list[Batch]:
        chosen = self.in_micro_batches(packs, cut)
        return [self.micro_batch(few, rows) for few, rows in zip(chosen, cut.rows, strict=True)]

    def micro_batch(self, packs: Sequence[Pack], rows: int) -> Batch:
        """The packs as rows of tensors, of a step whose micro-batches have `rows`."""
        layout = self.layout.of_rows(rows, self.batch_size)
        return collate(self.split, packs, self.pad_id, self.data.max_length, layout)
