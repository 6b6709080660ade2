"""The margin of an estimate: by what it depends on, and narrowed or widened by a user's own runs."""

from __future__ import annotations

from qlora.memory import margins
from qlora.memory.calibration import Correction
from qlora.memory.margins import Gaps

GIB = 1 << 30


def test_own_runs_narrow_the_margin_and_widen_it() -> None:
    """Three of them that agree, three that do not, and two, which are too few."""
    unknown = margins.of_tensors(10 * GIB, Correction())
    assert margins.of_tensors(10 * GIB, Correction(1.01, 3, 0.004)) < unknown / 2
    assert margins.of_tensors(10 * GIB, Correction(1.01, 3, 0.09)) > 5 * unknown
    assert margins.of_tensors(10 * GIB, Correction(1.01, 2, 0.0)) == unknown


def test_gaps_grow_with_what_is_not_weights_and_with_what_was_cast() -> None:
    assert margins.of_gaps(6 * GIB, Gaps(6 * GIB, 0)) == 0
    assert 0 < margins.of_gaps(8 * GIB, Gaps(6 * GIB, 0)) < margins.of_gaps(9 * GIB, Gaps(6 * GIB, 0))
    assert margins.of_gaps(8 * GIB, Gaps(6 * GIB, GIB)) > margins.of_gaps(8 * GIB, Gaps(6 * GIB, 0))
