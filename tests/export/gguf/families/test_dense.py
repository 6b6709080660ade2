"""Dense families: llama.cpp computes from our file what transformers computes, and sees each fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.gguf.families.cases import Case, check
from tests.export.gguf.families.dense_cases import CASES

# One for each mechanism: multipliers and a permutation; windows, layers without positions and a logit scale; biases,
# heads that turn in part and a head with a bias; queries scaled by their position.
FAST = ("granite", "cohere2", "phi", "ministral3")


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow) for case in CASES]
)
def test_a_familys_file_is_the_model_and_each_fault_is_seen(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)
