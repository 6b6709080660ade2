"""What a process holds and what a run adds to it, without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil

from qlora import api
from qlora.memory import host, margins, overheads
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
    """Beside what it holds by now: earlier tests' memory may go back to the system between two questions."""
    for count in (1, 200):
        more = np.ones(count * MIB, np.uint8)
        assert abs(estimator().held - psutil.Process().memory_info().rss) < 10 * MIB and more.size


def test_what_a_run_adds_depends_on_what_it_does() -> None:
    plain, asks = (host.added_bytes(100 * MIB, does) for does in (False, True))
    assert asks - plain == host.STUDY_BYTES > 0
    assert host.added_bytes(200 * MIB) - plain == round(host.FRAGMENTATION_SHARE * 100 * MIB)


QUICKSTART = DataFacts(400, 1, 24, True, typical=24, documents=19, trained=65, answer_tokens=11)


def test_the_quickstart_takes_what_was_measured() -> None:
    """By its end, its answers among them: 126 and 129 MiB beside what was held. Not less, and within 5 %."""
    recipe = load_recipe(ROOT / "recipes/quickstart.toml")
    asked = estimator()
    estimate = asked.estimate(recipe, QUICKSTART)
    assert 129 * MIB <= estimate.peak_bytes - asked.held <= 129 * 1.05 * MIB


def test_the_margin_holds_the_copy_of_a_state_that_is_written_meanwhile() -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.toml")
    estimate = estimator().estimate(recipe, QUICKSTART)
    parts = estimate.components
    copied = overheads.snapshot_bytes(parts["adapters"], parts["optimizer"], pinned=False)
    assert 10 * MIB < copied <= estimate.error_bytes - margins.HOST_BYTES


def test_an_estimate_without_rows_counts_what_reading_them_takes() -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.toml")
    question = api.question(recipe)
    assert question.machine.device_type == "cpu"
    assert question.estimate().components["context"] == question.estimator.held + host.READING_BYTES
