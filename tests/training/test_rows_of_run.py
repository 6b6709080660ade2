"""A run reads rows, or answers to them, and is measured where it has rows for that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from qlora.data.token_cache import PreparedSplit, TokenRow
from qlora.recipe.sections import DataSection, EvalSection, SourceSection, TrainSection
from qlora.training.dividing import Division
from qlora.training.rows_of_run import batches_of, evaluation_of
from qlora.training.step_batches import StepBatches

DATA = DataSection(train=(SourceSection(path="a"),), max_length=64)


def job(eval_rows: int) -> Any:
    rows = [TokenRow([1, 2, 3], [0.0, 1.0, 1.0])] * 3
    train = PreparedSplit(rows, [3] * 3, [2] * 3, ["a:1", "a:2", "a:3"], [0] * 3)
    evaluation = PreparedSplit(rows[:eval_rows], [3] * eval_rows, [2] * eval_rows, ["b:1"] * eval_rows, [0] * eval_rows)
    return SimpleNamespace(
        data=SimpleNamespace(train=train, eval=evaluation),
        recipe=SimpleNamespace(train=TrainSection(batch_size=2), eval=EvalSection()),
        chat=SimpleNamespace(pad_id=0),
        stop=SimpleNamespace(check=lambda: None),
        model=None,
        clock=None,
        device=torch.device("cpu"),
    )


def test_steps_read_rows_or_what_is_drawn_to_them() -> None:
    rows = batches_of(job(0), DATA, None)
    assert isinstance(rows, StepBatches) and rows.data == DATA and rows.batch_size == 2
    drawn: Any = SimpleNamespace(over=lambda section: ("answers", section), judged="judged")
    assert batches_of(job(0), DATA, drawn) == ("answers", DATA)


def test_a_run_is_measured_where_it_has_rows_for_that() -> None:
    drawn: Any = SimpleNamespace(judged="judged")
    of_step: Any = (None, "objective", drawn)
    recovery: Any = None
    assert evaluation_of(job(0), DATA, of_step, recovery, Division()) is None
    made = evaluation_of(job(2), DATA, of_step, recovery, Division())
    assert made is not None and (made.judge, made.objective, made.data) == ("judged", "objective", DATA)
    plain = evaluation_of(job(2), DATA, (of_step[0], of_step[1], None), recovery, Division())
    assert plain is not None and plain.judge is None
