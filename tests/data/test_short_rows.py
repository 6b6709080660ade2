"""The two short rows that a model is asked about: never longer than was said, whatever the rows are."""

from __future__ import annotations

import pytest

from qlora.data.short_rows import two_short_rows
from tests.data.cases import split_trained


def test_whole_rows_where_there_are_two() -> None:
    found = two_short_rows(split_trained((300, 9), (20, 4), (256, 9), (9, 0), (30, 5)), 256)
    assert found is not None and list(found.lengths) == [30, 256] and list(found.trained) == [5, 9]
    assert found.rows[0].loss_weights == [0.0] * 25 + [1.0] * 5 and list(found.wheres) == ["a.jsonl:5", "a.jsonl:3"]


@pytest.mark.parametrize("most", [16, 64, 256])
def test_the_beginnings_of_rows_that_are_all_long(most: int) -> None:
    found = two_short_rows(split_trained((8192, 10), (2048, 10), (2048, 2047)), most)
    assert found is not None and list(found.lengths) == [most, most]
    assert [row.input_ids for row in found.rows] == [list(range(most))] * 2
    assert list(found.trained) == [most - 1, most - 1]  # where the answers begin is far behind


def test_one_short_row_and_a_long_one() -> None:
    found = two_short_rows(split_trained((2048, 10), (20, 4)), 256)
    assert found is not None and list(found.lengths) == [20, 256]


def test_fewer_than_two_rows_with_a_trained_token_are_none() -> None:
    assert two_short_rows(split_trained((20, 4), (30, 0)), 256) is None
