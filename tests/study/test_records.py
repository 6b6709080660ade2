"""Keys follow from what they are made of, and what a passage adds to an answer is counted in nats."""

from __future__ import annotations

import math

import pytest

from qlora.study.records import Answer, key_of


def test_a_key_is_a_function_of_its_parts() -> None:
    assert key_of("a", [1, "ü"]) == key_of("a", [1, "ü"]) and len(key_of()) == 32
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("a", ["bc"]), key_of(["a", "bc"])}) == 4


def test_the_gain_is_nats_a_token() -> None:
    answer = Answer("0" * 32, "x", (1, 2), True, 0.8, 0.7, "y", 0.1, "x")
    assert answer.gain == pytest.approx(math.log(8))
    empty = Answer("0" * 32, "", (), True, 0.0, 0.0, "", 0.0, "")
    assert empty.gain == 0
