"""Of a test's many cases those that CI runs; `tools/check -m "not gpu"` runs all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases (tuples where a test takes several values), with the mark `every` on all but those that are `kept`."""
    found = list(cases)
    assert all(case in found for case in kept), "a case of no such test"
    return [case if case in kept else pytest.param(*_values(case), marks=pytest.mark.every) for case in found]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
