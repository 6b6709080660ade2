"""A sample of the table of families in recipes/MODELS.md; `python tools/families.py` tries all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.all_families import DENSE, FAMILIES, MIXTURES
from tests.family_checks import CHECKS, Trial, answers

# A kind each: per-layer inputs, a recurrent hybrid, weights read directly, shared blocks, keys of version 5 alone.
KINDS = ("gemma3n_text", "qwen3_5_text", "jamba", "zamba2", "lfm3", "smollm3", "falcon_h1", "rwkv")
QUICK = ("loads", "loss")


@pytest.mark.parametrize("family", KINDS)
def test_it_loads_and_its_loss_is_transformers_own(family: str, tmp_path: Path) -> None:
    wrong = {column: text for column, (right, text) in answers(family, tmp_path, QUICK) if not right}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("family", ("gemma3n_text", "zamba2"))
def test_it_is_right_in_every_column(family: str, tmp_path: Path) -> None:
    columns = tuple(column for column in CHECKS if column != "measured")
    wrong = {column: text for column, (right, text) in answers(family, tmp_path, columns) if not right}
    assert not wrong


def test_a_loss_that_is_not_transformers_own_is_seen(tmp_path: Path) -> None:
    """The column itself can fail: of a base whose weights are changed after we have opened it."""
    trial = Trial("llama", tmp_path)
    reference, alone, packed = trial.logprobs
    trial.__dict__["logprobs"] = (reference + 1e-2, alone, packed)
    assert not CHECKS["loss"](trial).right and torch.isfinite(reference).all()


def test_the_page_has_a_row_for_every_family() -> None:
    page = (Path(__file__).parent.parent / "recipes" / "MODELS.md").read_text(encoding="utf-8")
    page = page.partition("\nMixtures of experts, held")[0]
    # The first is the head.
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert rows[1:] == list(DENSE) and len(FAMILIES) == len(DENSE) + len(MIXTURES) >= 82
