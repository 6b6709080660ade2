"""Over the quickstart's base: pairs whose better answer no base knows beforehand are told apart on other products.

One seed and few steps; `python tools/preference_table.py` has all objectives, three seeds and more steps.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sampling import sampled
from tools import preference_table

pytestmark = pytest.mark.slow
STEPS = 100


@pytest.mark.parametrize(("name", "steps"), sampled([("dpo", STEPS), ("simpo", 2 * STEPS)], ("dpo", STEPS)))
def test_what_was_a_matter_of_chance_is_told_apart(tmp_path: Path, name: str, steps: int) -> None:
    """With a reference, and with none."""
    before, after = preference_table.trained(tmp_path, name, steps)
    assert before["accuracy"] == pytest.approx(0.5, abs=0.1) and before["likelier"] == pytest.approx(0.5, abs=0.1)
    assert after["accuracy"] >= 0.85 and after["compared"] == 90 and after["margin"] > 1


def test_swapped_labels_teach_the_opposite(tmp_path: Path) -> None:
    """The control: what is learned is what the labels say, and nothing that answers have by themselves."""
    _, after = preference_table.trained(tmp_path, "swapped", STEPS)
    assert after["accuracy"] <= 0.15
