"""Packing: nothing lost, nothing doubled, nothing over the limit; as first-fit decreasing in its plain form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.data.packing import pack


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    max_length = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, max_length), max_size=80)), max_length


def plain_first_fit_decreasing(lengths: list[int], max_length: int) -> list[tuple[int, ...]]:
    """As a textbook has it, in n² steps."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for members in packs:
            if sum(lengths[at] for at in members) + lengths[index] <= max_length:
                members.append(index)
                break
        else:
            packs.append([index])
    return [tuple(members) for members in packs]


@given(rows())
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(given_rows: tuple[list[int], int]) -> None:
    lengths, max_length = given_rows
    packs = pack(lengths, max_length)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= max_length for members in packs)


@given(rows())
def test_it_is_first_fit_decreasing(given_rows: tuple[list[int], int]) -> None:
    assert pack(*given_rows) == plain_first_fit_decreasing(*given_rows)


@given(rows(), st.randoms())
def test_the_number_of_packs_does_not_depend_on_the_order(given_rows: tuple[list[int], int], chance: object) -> None:
    lengths, max_length = given_rows
    assert len(pack(lengths, max_length)) == len(pack(sorted(lengths), max_length))


@pytest.mark.parametrize("lengths", [[5], [0], [-1], [1, 5, 1]])
def test_what_does_not_fit_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="a pack takes 1 to 4"):
        pack(lengths, 4)


def test_no_rows_are_no_packs() -> None:
    assert pack([], 8) == []


def test_two_hundred_thousand_rows_take_seconds() -> None:
    lengths = [1 + (index * 7919) % 1024 for index in range(200_000)]
    packs = pack(lengths, 2048)
    assert sum(lengths) / (2048 * len(packs)) > 0.99
