"""Answers as micro-batches: which questions a step asks, what stands where, and what is counted."""

from __future__ import annotations

import pytest
import torch

from qlora.data.layout import Layout
from qlora.dealing import in_order
from qlora.training.answered import Order
from qlora.training.memory_plan import MemorySettings
from tests.training.answer_cases import LENGTHS, batches_over, drawn, train_section


def test_an_answer_stands_behind_its_prompt_with_what_is_known_of_it() -> None:
    answers = drawn([0.5, -1.0, 0.0, 1.0, 2.0, -0.5])
    (batch,) = batches_over(answers, train_section()).batches_of(answers, 6)
    assert batch.input_ids_BS.shape == (6, 24) and batch.signs_R is not None
    assert batch.signs_R.tolist() == [1, -1, 0, 1, 1, -1]
    targets_T = batch.targets_BS.flatten()[batch.trained_T]
    assert targets_T.tolist() == [token for answer in answers for token in answer.token_ids]
    assert batch.drawn_KT is not None
    advantages, logprobs, references, olds = batch.drawn_KT.tolist()
    assert advantages == [answer.advantage for answer in answers for _ in answer.token_ids]
    for told, name in ((logprobs, "logprobs"), (references, "reference"), (olds, "old")):
        assert told == pytest.approx([value for answer in answers for value in getattr(answer, name)], rel=1e-6)
    weights_T = batch.loss_weights_BS.flatten()[batch.trained_T]
    assert weights_T.tolist() == pytest.approx([1 / count for _, count, _ in LENGTHS for _ in range(count)])


def test_answers_that_were_cut_teach_nothing_where_that_is_asked_for() -> None:
    answers = drawn([1.0] * 6)
    masked = batches_over(answers, train_section(mask_truncated_completions=True))
    counts = [batch.trained_T.numel() for batch in masked.batches_of(answers, 1)]
    assert counts == [4, 9, 0, 1, 3, 0]
    assert [batch.drawn_KT.shape for batch in masked.batches_of(answers, 1)] == [(4, count) for count in counts]  # type: ignore[union-attr]


def test_steps_ask_rows_and_learn_answers() -> None:
    answers = drawn([1.0] * 6)
    batches = batches_over(answers, train_section(batch_size=2, num_iterations=2, epochs=3))
    assert (batches.batch_size, batches.steps) == (6, 6)
    packs = [batches.order.packs_of_step(step) for step in range(6)]
    assert packs[0] == packs[1] != [] and packs[2] == packs[3] and {len(pack) for pack in packs[0]} == {1}
    assert [batches.order.epoch_of_step(step) for step in range(5)] == [0, 0.5, 1, 1.5, 2]
    assert isinstance(batches.order, Order) and batches.order.epoch_packs(0) == packs[0]
    assert batches.tokens(packs[0]) == sum(asked + count for asked, count, _ in LENGTHS)
    assert batches.in_micro_batches(packs[0], in_order(6, 4)) == [[(0,), (1,)], [(1,)]]
    limited = batches_over(answers, train_section(batch_size=2, num_iterations=2, max_steps=5))
    assert limited.steps == 5


def test_the_plan_says_how_many_answers_a_step_has() -> None:
    batches = batches_over(drawn([1.0] * 6), train_section(batch_size=2, num_iterations=2, epochs=3))
    plan = batches.plan(MemorySettings(4, False), 0, 1, 2)
    assert (plan.batch_size, plan.accumulation, plan.steps, plan.epochs) == (2, 2, 6, 3)
    assert "2 rows × 3 answers = 6 a step = 2 micro-batches of 4" in plan.arithmetic
    assert "2 steps on each drawing" in plan.arithmetic


def test_the_longest_micro_batch_is_as_long_as_any_can_be() -> None:
    answers = drawn([1.0] * 6)
    batch = batches_over(answers, train_section()).longest(2)
    assert batch.input_ids_BS.shape == (2, 24)  # 7 + 12, in a multiple of 8
    assert batch.trained_T.numel() == 24 and batch.signs_R is not None and batch.signs_R.tolist() == [1, -1]
    short = batches_over(answers, train_section(), max_length=16)
    assert short.most_tokens == 16 and short.room_beside(7) == 9 and short.longest(1).input_ids_BS.shape == (1, 16)


def test_layers_that_are_compiled_get_one_width() -> None:
    answers = drawn([1.0] * 6)
    fixed = batches_over(answers, train_section(), layout=Layout(16, continues=True, fixed=True))
    assert {tuple(batch.input_ids_BS.shape) for batch in fixed.batches_of(answers, 2)} == {(2, 32)}
    assert torch.equal(fixed.longest(2).input_ids_BS[:, 19:], torch.zeros(2, 13, dtype=torch.int64))
