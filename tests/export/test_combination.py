"""What several adapters are to be combined by: what makes no sense is refused before a file is opened."""

from __future__ import annotations

import pytest

from qlora.errors import ExportError
from qlora.export.combination import DENSITY, Combination, parse_weights


@pytest.mark.parametrize(
    ("combination", "count", "what"),
    [
        (Combination((0.5,)), 2, "2 adapters and 1 `weights`"),
        (Combination((0.5,)), 1, "and 1 is named"),
        (Combination((0.5, 0.0)), 2, "0 is no weight"),
        (Combination((0.5, float("nan"))), 2, "nan is no weight"),
        (Combination((0.5, 0.5), "slerp"), 2, "unknown method 'slerp'"),
        (Combination((0.5, 0.5), "linear", 0.5), 2, "`density` is for methods that drop values"),
        (Combination((0.5, 0.5), "ties", 0.0), 2, "0 is no share"),
    ],
)
def test_what_makes_no_sense_is_refused(combination: Combination, count: int, what: str) -> None:
    with pytest.raises(ExportError, match=what):
        combination.check(count)


def test_what_is_kept_follows_from_the_method() -> None:
    assert Combination((1.0, 1.0)).kept == 1.0
    assert Combination((1.0, 1.0), "ties").kept == DENSITY
    assert Combination((1.0, 1.0), "dare_ties", 0.2).kept == 0.2
    Combination((0.7, -0.3), "ties", 1.0).check(2)


def test_weights_are_numbers_with_commas() -> None:
    assert parse_weights("0.7, -.3,2") == (0.7, -0.3, 2.0)
    for text in ("", "0.7;0.3", "a,b", "0.7,"):
        with pytest.raises(ExportError, match="are no numbers"):
            parse_weights(text)
