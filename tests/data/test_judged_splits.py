"""A pair is one unit: drawn, packed and collated as a whole; and answers to other questions, for KTO."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.judged_splits import apart, mismatched, most_rows, packs_of, unit, with_packing
from qlora.data.loader import TrainOrder, collate, eval_packs
from tests.data.cases import data_of
from tests.data.judged_cases import judged_split

pairs_st = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=20)


@settings(deadline=None)
@given(pairs_st, st.booleans(), st.integers(1, 4), st.integers(0, 2))
def test_an_epoch_has_each_pair_once_and_never_parts_it(
    pairs: list[tuple[int, int, int]], packing: bool, batch_size: int, epoch: int
) -> None:
    """Pairs of which both sides fit in `max_length` alone, and some that do not fit together."""
    split, data = judged_split(pairs, together=packing), data_of(packing, max_length=16)
    for packs in (TrainOrder(split, data, 7, batch_size).epoch_packs(epoch), eval_packs(split, data)):
        assert sorted(row for members in packs for row in members) == list(range(2 * len(pairs)))
        for members in packs:
            assert all(row + 1 == following for row, following in zip(members[::2], members[1::2], strict=True))
            batch = collate(split, [members], 0, 16)
            shares = packing and sum(split.lengths[row] for row in members) <= 16
            assert batch.rows == (1 if shares else 2)
            assert batch.signs_R is not None and batch.signs_R.tolist() == [1.0, -1.0] * (len(members) // 2)
            assert batch.answer_T is not None and len(batch.answer_T) == len(batch.trained_T)
            counts = [int((batch.answer_T == number).sum()) for number in range(len(members))]
            assert counts == [split.trained[row] for row in members]
            assert bool((batch.loss_weights_BS >= 0).all())


def test_a_part_of_a_source_is_a_part_of_its_pairs() -> None:
    split = judged_split([(2, 3, 4)] * 10)
    order = TrainOrder(split, data_of(weights=(0.5,), max_length=16), 3, 2)
    rows = [row for members in order.epoch_packs(0) for row in members]
    assert len(rows) == 10 and all(rows[at] % 2 == 0 and rows[at + 1] == rows[at] + 1 for at in range(0, 10, 2))


def test_rows_that_are_no_pairs_are_packed_as_before() -> None:
    split = judged_split([(2, 3, 4)] * 6, paired=False)
    assert unit(split, 3) == (3,) and most_rows(split, data_of()) == 1
    rows = list(range(12))
    random.Random(0).shuffle(rows)
    packs = packs_of(split, rows, 16)
    assert sorted(row for members in packs for row in members) == list(range(12))
    assert apart(split, packs, 16) == packs


def test_how_many_rows_of_tensors_a_pack_may_be() -> None:
    short, long = judged_split([(2, 3, 4)] * 3), judged_split([(2, 3, 4), (2, 10, 12)])
    assert most_rows(short, data_of()) == 1 and most_rows(long, data_of()) == 2
    assert most_rows(short, data_of(packing=False)) == 2
    assert apart(with_packing(short, False), [(0, 1)], 16) == [(0,), (1,)]


def test_other_answers_are_those_of_other_questions() -> None:
    split = judged_split([(3, 4, 5), (2, 6, 1), (4, 2, 2)], paired=False)
    others = mismatched(split)
    assert len(others.rows) == 6
    for row in range(6):
        own, other = split.rows[row], others.rows[row]
        asked = own.loss_weights.index(next(weight for weight in own.loss_weights if weight))
        assert other.input_ids[:asked] == own.input_ids[:asked] and not any(other.loss_weights[:asked])
        answer = other.input_ids[asked:]
        of = [at for at in range(6) if split.rows[at].input_ids[-split.trained[at] :][: len(answer)] == answer]
        assert of and all(at // 2 != row // 2 for at in of)  # the sides of a pair have one question
        assert all(weight == 1 for weight in other.loss_weights[asked:]) and len(other.input_ids) == others.lengths[row]
        assert others.lengths[row] <= max(split.lengths)


def test_of_one_question_alone_the_next_answer_is_taken() -> None:
    split = judged_split([(3, 4, 5)], paired=False)
    others = mismatched(split)
    assert others.rows[0].input_ids[3:] == split.rows[1].input_ids[3:]
    assert others.rows[1].input_ids[3:] == split.rows[0].input_ids[3:]
