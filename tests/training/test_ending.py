"""The last event has the run's totals, of the state that it ended in."""

from __future__ import annotations

from pathlib import Path

from qlora.events import Recorder
from tests.runs import EVERYTHING, run_dir, train, write_recipe


def test_the_last_event_has_the_totals_of_the_state(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder: Recorder = train(recipe, *EVERYTHING, "train.max_steps=2")
    (end,) = (event.as_dict() for event in recorder.of("end"))
    steps = [event.as_dict() for event in recorder.of("step")]
    assert (end["step"], end["steps"], end["reason"]) == (2, 2, "finished")
    assert end["tokens"] == sum(step["tokens"] for step in steps)
    assert end["trained_tokens"] == sum(step["trained_tokens"] for step in steps)
    assert end["train_loss"] == steps[-1]["loss"] and end["eval_loss"] is not None
    assert end["adapter"] == str(run_dir(recipe) / "adapter") and end["adapter_step"] == 2
    assert set(end["memory"]) == {"peak", "weights", "adapters", "optimizer"} and "training" in end["phases"]
