"""Over the quickstart's base: pairs whose better answer no base knows beforehand are told apart on other products."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora import api
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
KEYS = (
    *("data.max_length=400", "train.batch_size=1", "train.max_steps=100", "train.learning_rate=2e-3"),
    *("train.gradient_checkpointing=false", "eval.every_steps=100", "eval.samples=0"),
)


def evaluated(folder: Path, objective: str, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last evaluation of a run on rows that the tool writes."""
    command = [sys.executable, "tools/make_preference_rows.py", "--out", str(folder), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    base = ROOT / "recipes" / "quickstart" / "base"
    recipe, recorder = folder / "pairs.toml", Recorder()
    sides = "".join(f'[[data.{side}]]\npath = "{side}.jsonl"\n' for side in ("train", "eval"))
    recipe.write_text(
        f'[model]\nbase = "{base}"\n{sides}[train]\nobjective = "{objective}"\n[output]\ndir = "{folder / "runs"}"\n'
    )
    api.train(load_recipe(recipe, KEYS), name="pairs", sink=recorder)
    told = [event.as_dict() for event in recorder.of("preference") if event.as_dict()["evaluated"]]
    return told[0], told[-1]


def test_dpo_tells_apart_what_was_a_matter_of_chance(tmp_path: Path) -> None:
    before, after = evaluated(tmp_path, "dpo")
    assert before["accuracy"] == pytest.approx(0.5, abs=0.1) and before["likelier"] == pytest.approx(0.5, abs=0.1)
    assert after["accuracy"] >= 0.85 and after["compared"] == 90 and after["margin"] > 1


def test_swapped_labels_teach_the_opposite(tmp_path: Path) -> None:
    """The control: what is learned is what the labels say, and nothing that answers have by themselves."""
    _, after = evaluated(tmp_path, "dpo", "--swapped")
    assert after["accuracy"] <= 0.15


def test_simpo_learns_it_without_a_reference(tmp_path: Path) -> None:
    before, after = evaluated(tmp_path, "simpo")
    assert before["accuracy"] == pytest.approx(0.5, abs=0.1) and after["accuracy"] > 0.6
