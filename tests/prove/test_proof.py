"""What proofs compare with: bits, and distances of gradients."""

from __future__ import annotations

import math

import pytest
import torch

from qlora.prove.proof import all_equal, distance, not_here


def test_a_distance_is_a_share_of_the_other() -> None:
    one, other = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert distance([one], [other]) == pytest.approx(5 / 4)
    assert distance([one], [one]) == 0 and distance([one], [one * 0]) == math.inf
    assert distance([one * 0], [one * 0]) == 0


def test_bits_and_types_count() -> None:
    one = torch.tensor([1.0])
    assert all_equal([one], [one.clone()]) and not all_equal([one], [one.double()])
    assert not all_equal([one], [torch.nextafter(one, one * 2)])


def test_what_does_not_apply_neither_holds_nor_is_broken() -> None:
    assert not_here("no card").holds is None
