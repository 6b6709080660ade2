"""Over the quickstart's base: what rewards alone say of drawn answers is learned, and holds for other things.

One seed and few steps; `python tools/reward_table.py` has three seeds, more steps and the control.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import reward_table

pytestmark = pytest.mark.slow


def test_which_manner_is_right_is_learned_from_exact_match_alone(tmp_path: Path) -> None:
    assert 0.15 <= reward_table.warmed(tmp_path) <= 0.4, "of four manners it knows, and not which is right"
    before, after = reward_table.judged(tmp_path, seed=3, steps=30)
    assert before <= 0.4 and after >= 0.5
