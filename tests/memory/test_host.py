"""What a process holds and what a run adds to it, without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlora import api
from qlora.memory import host, overheads
from qlora.memory.estimate import DataFacts, Estimator
from qlora.memory.hardware import Machine
from qlora.model.meta_model import text_config
from qlora.model.tensors import load_json
from qlora.recipe.reading import load_recipe

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20
CPU = Machine("cpu", 16 << 30, "RAM available")


def estimator() -> Estimator:
    text, _ = text_config(load_json(ROOT / "recipes/quickstart/base/config.json"), "quickstart")
    return Estimator(text, "quickstart", CPU)


def test_the_process_is_asked_what_it_holds() -> None:
    before = estimator().held
    more = np.ones(200 * MIB, np.uint8)
    assert estimator().held - before > 190 * MIB and more.size


def test_what_a_run_adds_depends_on_shapes_and_has_an_end() -> None:
    one, some, all_of_them, more = (host.added_bytes(100 * MIB, widths, False) for widths in (1, 5, 7, 1000))
    assert one < some < all_of_them == more < host.added_bytes(100 * MIB, 1000, True)


@pytest.mark.parametrize(
    ("facts", "measured"),
    [
        # 40 steps on packs of up to 400 tokens and their answers: resident 686 MiB at the highest, 489 before the base;
        # states were written between steps then, and no copy of one was held at the peak.
        (DataFacts(400, 1, 30, True, trained=100, widths=50, answer_tokens=128), 197),
    ],
)
def test_the_quickstart_takes_what_was_measured(facts: DataFacts, measured: int) -> None:
    """Not less, and within 20 %: the constants are those of a larger base too."""
    recipe = load_recipe(ROOT / "recipes/quickstart.toml")
    asked = estimator()
    estimate = asked.estimate(recipe, facts)
    parts = estimate.components
    copied = overheads.snapshot_bytes(parts["adapters"], parts["optimizer"], pinned=False)
    assert 0 < copied < 20 * MIB
    taken = estimate.peak_bytes - asked.held - copied
    assert measured * MIB <= taken <= measured * 1.2 * MIB


def test_an_estimate_without_rows_counts_what_reading_them_takes() -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.toml")
    question = api.question(recipe)
    assert question.machine.device_type == "cpu"
    assert question.estimate().components["context"] == question.estimator.held + host.READING_BYTES
