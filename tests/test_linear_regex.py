"""Patterns of files: what an engine without backtracking finds, and what it cannot is refused with its reason."""

from __future__ import annotations

import time

import pytest

from qlora.linear_regex import MOST_COST, UnsafePatternError, cost, engine


def test_a_pattern_is_found_anywhere_unless_it_is_anchored() -> None:
    assert engine("[0-9]+ crowns").isinstance_python("about 50 crowns.")
    assert not engine("^[0-9]+ crowns$").isinstance_python("about 50 crowns.")
    assert engine(r"^\p{Lu}").isinstance_python("Ärger")


def test_what_keeps_a_backtracking_engine_busy_for_years_takes_no_time() -> None:
    began = time.monotonic()
    assert not engine("(a+)+$").isinstance_python("a" * 5_000 + "b")
    assert time.monotonic() - began < 5  # Python's own doubles with every letter: 2^5000


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreference"),
        ("(", "unclosed"),
        ("a{9999}{999}", "size limit|too large"),
    ],
)
def test_what_cannot_be_matched_in_linear_time_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(UnsafePatternError, match=why):
        engine(pattern)


def test_the_cost_of_a_pattern_is_its_length_times_its_repetitions() -> None:
    assert cost("abc") == 3
    assert cost("(a{3}){4}") == 9 * 12
    assert cost("a{1,}") == 5
    assert cost("(a{99999999}){99999999}") == MOST_COST + 1
