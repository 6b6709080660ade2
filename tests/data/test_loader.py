"""The order of rows as a pure function of (seed, epoch, step), and the tensors of a micro-batch."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.chat import TokenRow
from qlora.data.loader import TrainOrder, collate, eval_packs
from qlora.data.token_cache import PreparedSplit
from tests.data.cases import data_of, split_of

lengths_st = st.lists(st.integers(1, 16), min_size=1, max_size=40)


@settings(deadline=None)
@given(lengths_st, st.booleans(), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_is_every_row_once(lengths: list[int], packing: bool, batch_size: int, epoch: int) -> None:
    order = TrainOrder(split_of(lengths), data_of(packing), 7, batch_size)
    rows = [row for members in order.epoch_packs(epoch) for row in members]
    assert sorted(rows) == list(range(len(lengths)))


@settings(deadline=None)
@given(lengths_st, st.booleans(), st.integers(1, 5), st.randoms())
def test_any_step_can_be_asked_for_in_any_order(
    lengths: list[int], packing: bool, batch_size: int, chance: random.Random
) -> None:
    """Five epochs one after the other = jumping to each step, backwards and forwards, with a fresh object each."""
    split, data = split_of(lengths), data_of(packing)
    order = TrainOrder(split, data, 3, batch_size)
    straight = [order.packs_of_step(step) for step in range(order.steps(5))]
    steps = list(range(len(straight)))
    chance.shuffle(steps)
    jumping = TrainOrder(split, data, 3, batch_size)
    assert all(jumping.packs_of_step(step) == straight[step] for step in steps)
    last = steps[-1]
    assert TrainOrder(split, data, 3, batch_size).packs_of_step(last) == straight[last]


def test_steps_run_through_the_epochs_and_never_mix_them() -> None:
    order = TrainOrder(split_of([5] * 10), data_of(packing=False), 1, 4)
    assert [order.steps_in_epoch(epoch) for epoch in range(3)] == [3, 3, 3]
    assert [len(order.packs_of_step(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    for epoch in range(2):
        packs = [members for step in range(3) for members in order.packs_of_step(3 * epoch + step)]
        assert packs == order.epoch_packs(epoch)
    assert [order.epoch_of_step(step) for step in (0, 1, 3, 4)] == [0, 1 / 3, 1, 4 / 3]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (3, 9), (0.5, 2), (1 / 3, 1), (2.01, 7), (0.001, 1)])
def test_steps_of_a_number_of_epochs(epochs: float, steps: int) -> None:
    assert TrainOrder(split_of([5] * 10), data_of(packing=False), 1, 4).steps(epochs) == steps


def test_epochs_and_seeds_differ_and_repeat() -> None:
    split = split_of([3] * 30)

    def order_of(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return TrainOrder(split, data_of(), seed, 4).epoch_packs(epoch)

    assert order_of(1, 0) == order_of(1, 0)
    assert order_of(1, 0) != order_of(1, 1)
    assert order_of(1, 0) != order_of(2, 0)


def test_the_order_is_the_same_on_every_machine() -> None:
    order = TrainOrder(split_of([3] * 8), data_of(packing=False), 42, 4)
    assert [row for (row,) in order.epoch_packs(0)] == [4, 5, 1, 0, 3, 2, 7, 6]


def test_the_global_generators_play_no_part() -> None:
    split, data = split_of([3] * 8), data_of()
    states = random.getstate(), torch.random.get_rng_state()
    packs = TrainOrder(split, data, 42, 4).epoch_packs(3)
    assert random.getstate() == states[0] and torch.equal(torch.random.get_rng_state(), states[1])
    random.seed(1)
    assert TrainOrder(split, data, 42, 4).epoch_packs(3) == packs


def test_weights_repeat_and_draw_rows() -> None:
    split = split_of([3] * 30, [0] * 10 + [1] * 10 + [2] * 10)
    order = TrainOrder(split, data_of(packing=False, weights=(2.0, 0.5, 1.3)), 5, 4)
    for epoch in range(3):
        times = Counter(row for (row,) in order.epoch_packs(epoch))
        assert [times[row] for row in range(10)] == [2] * 10
        assert sum(times[row] for row in range(10, 20)) == 5 and max(times[row] for row in range(10, 20)) == 1
        assert sorted(times[row] for row in range(20, 30)) == [1] * 7 + [2] * 3
    drawn = [{row for (row,) in order.epoch_packs(epoch) if 10 <= row < 20} for epoch in range(6)]
    assert len(set().union(*drawn)) > 7  # other halves in other epochs


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_is_every_row_once_in_one_order(packing: bool) -> None:
    split = split_of([3, 9, 5, 9, 1])
    packs = eval_packs(split, data_of(packing))
    assert sorted(row for members in packs for row in members) == [0, 1, 2, 3, 4]
    assert packs == eval_packs(split, data_of(packing))
    assert packs[0][0] == 1


def test_a_batch_of_packs() -> None:
    batch = collate(split_of([3, 2, 4]), [(0, 1), (2,)], pad_id=9, max_length=16)
    assert batch.input_ids_BS.tolist() == [[0, 1, 2, 100, 101, 9, 9, 9], [200, 201, 202, 203, 9, 9, 9, 9]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.document_ids_BS.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.targets_BS.tolist() == [[1, 2, 0, 101, 0, 0, 0, 0], [201, 202, 203, 0, 0, 0, 0, 0]]
    assert batch.loss_weights_BS.tolist() == [[1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.trained_T.tolist() == [0, 1, 3, 8, 9, 10]
    assert batch.loss_weights_BS.dtype is torch.float32 and batch.input_ids_BS.dtype is torch.int64


def test_padding_is_told_by_its_place_not_by_its_id() -> None:
    """The pad's id is also the end of every answer: it stays trained there."""
    end = 2
    rows = [TokenRow([5, 6, end], [0.0, 1.0, 1.0])]
    batch = collate(PreparedSplit(rows, [3], [2], ["a:1"], [0]), [(0,)], pad_id=end, max_length=16)
    assert batch.targets_BS[0, :2].tolist() == [6, end]
    assert batch.loss_weights_BS[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("length", "max_length", "width"), [(5, 16, 8), (5, 6, 6), (8, 16, 8), (9, 64, 16)])
def test_width_is_a_multiple_of_eight_within_max_length(length: int, max_length: int, width: int) -> None:
    batch = collate(split_of([length]), [(0,)], 0, max_length)
    assert batch.input_ids_BS.shape == (1, width)


def test_a_pack_over_max_length_is_refused() -> None:
    with pytest.raises(ValueError, match="over max_length"):
        collate(split_of([5, 5]), [(0, 1)], 0, 8)


@settings(deadline=None)
@given(lengths_st)
def test_no_token_is_lost_between_rows_and_tensors(lengths: list[int]) -> None:
    split, data = split_of(lengths), data_of()
    packs = eval_packs(split, data)
    batch = collate(split, packs, -1, data.max_length)
    for number, members in enumerate(packs):
        tokens = [token for row in members for token in split.rows[row].input_ids]
        width = batch.input_ids_BS.shape[1]
        assert batch.input_ids_BS[number].tolist() == tokens + [-1] * (width - len(tokens))
        documents = batch.document_ids_BS[number].tolist()
        assert documents == sorted(documents)
    assert int(batch.loss_weights_BS.sum()) == sum(split.trained)
