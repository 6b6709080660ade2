"""A run that a function judges: named each time, kept by its sha256, and nothing else is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora import api
from qlora.errors import RewardError
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe
from tests.rewards.cases import function_of

BASE = Path(__file__).parent.parent.parent / "recipes" / "quickstart" / "base"
SOURCE = "def score(completions, answer, level):\n    return [len(c) / 10 + n for c, n in zip(completions, level)]\n"
pytestmark = pytest.mark.slow


def test_a_function_is_named_each_time_and_stays_the_same(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": "50 crowns", "level": n} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.toml").write_text(
        f'[model]\nbase = "{BASE}"\n[data]\nmax_length = 64\neval_fraction = 0\n[[data.train]]\npath = "rows.jsonl"\n'
        f'[train]\nobjective = "grpo"\nmax_steps = 1\nbatch_size = 2\nnum_generations = 2\nmax_completion_length = 4\n'
        f'beta = 0\n[report]\nsinks = ["jsonl"]\n[output]\ndir = "{tmp_path / "runs"}"\n'
    )
    recipe, function = load_recipe(tmp_path / "r.toml"), function_of(tmp_path, SOURCE)
    with pytest.raises(RewardError, match="has no reward"):
        api.train(recipe, name="r")
    recorder = Recorder()
    api.train(recipe, name="r", rewards=[function], sink=recorder)
    said = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert "of 4 rows, the rows' own answers are worth: rewards.py:score 2.4" in said
    kept = json.loads((tmp_path / "runs" / "r" / "rewards.json").read_text())
    assert kept["functions"][0]["name"] == "rewards.py:score"
    with pytest.raises(RewardError, match="none is given") as missing:
        api.train(recipe, name="r", mode="resume")
    assert missing.value.hint.endswith(f"mode='resume' `rewards` {function}")
    assert api.train(recipe, name="r", mode="resume", rewards=[function]).state.step == 1
    (tmp_path / "rewards.py").write_text(f"{SOURCE}# another\n")
    with pytest.raises(RewardError, match="has changed since the run began"):
        api.train(recipe, name="r", mode="resume", rewards=[function])
