"""What a step reads: its packs in their order, whatever the size of a micro-batch, and the arithmetic that is shown."""

from __future__ import annotations

import pytest
import torch

from qlora.dealing import in_order
from qlora.recipe.sections import TrainSection
from qlora.training.memory_plan import MemorySettings
from qlora.training.step_batches import StepBatches
from tests.data.cases import data_of, split_of

LENGTHS = [5, 9, 3, 14, 7, 2, 11, 6, 4, 8]


def rows_of(packing: bool, **train: int) -> StepBatches:
    return StepBatches.of(split_of(LENGTHS), data_of(packing), TrainSection(**train), pad_id=0)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 9])
def test_micro_batches_of_any_size_are_the_same_rows(packing: bool, micro_batch_size: int) -> None:
    rows = rows_of(packing, batch_size=4, epochs=1)
    packs = rows.order.packs_of_step(0)
    cut = in_order(len(packs), micro_batch_size)
    alone = [rows.micro_batch([pack], 1).input_ids_BS.shape[1] for pack in packs]
    assert rows.lengths(packs) == alone
    parts = rows.in_micro_batches(packs, cut)
    assert [pack for part in parts for pack in part] == packs
    batches = rows.micro_batches(packs, cut)
    assert [batch.rows for batch in batches] == [len(part) for part in parts]
    whole = rows.micro_batch(packs, 4)
    kept = [batch.input_ids_BS.flatten()[batch.trained_T] for batch in batches]
    assert torch.equal(torch.cat(kept), whole.input_ids_BS.flatten()[whole.trained_T])
    assert rows.tokens(packs) == sum(LENGTHS[row] for pack in packs for row in pack)


def test_the_longest_micro_batch_holds_the_longest_rows() -> None:
    batch = rows_of(packing=False, batch_size=4, epochs=1).longest(2)
    assert batch.rows == 2 and batch.trained_T.numel() == (14 - 1) + (11 - 1)


def test_the_plan_shows_its_arithmetic() -> None:
    rows = rows_of(packing=False, batch_size=4, epochs=2)
    plan = rows.plan(MemorySettings(3, True), 2, 10, 100)
    assert plan.arithmetic == ("10 rows an epoch ÷ 4 a step = 3 steps an epoch; 4 rows a step = 2 micro-batches of 3")
    assert (plan.train_rows, plan.eval_rows, plan.tokens_per_epoch) == (10, 2, sum(LENGTHS))
    assert (plan.steps, plan.epochs, plan.accumulation) == (6, 2.0, 2) and plan.memory is None
    assert rows_of(packing=False, batch_size=4, max_steps=5).steps == 5
