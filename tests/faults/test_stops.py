"""A stop inside an evaluation or an answer: what was not finished is done again, once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import api
from qlora.errors import StoppedBySignal
from qlora.events import Event, Recorder, Sinks
from qlora.model.adapter_folder import delivered_step
from qlora.recipe.reading import load_recipe
from qlora.report.files import read_events
from qlora.stop import StopRequest
from tests.runs import hashes, run_dir, train, values, write_recipe

SETTINGS = (
    *("train.max_steps=6", "train.batch_size=2", "data.max_length=48", "data.eval_fraction=0.4", "lora.r=4"),
    *("eval.every_steps=2", "eval.samples=1", "checkpoint.every_steps=100", "train.learning_rate=1e-3"),
)


class StopInside:
    """Asks for a stop at the first progress of a task after a step."""

    def __init__(self, step: int, task: str, stop: StopRequest) -> None:
        self.step, self.task, self.stop = step, task, stop
        self.done = 0

    def emit(self, event: Event) -> None:
        said = event.as_dict()
        self.done = said["step"] if event.kind == "step" else self.done
        if self.done == self.step and said.get("task") == self.task:
            self.stop.set()

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[dict[str, str], list[tuple[int, float]]]:
    recipe = write_recipe(tmp_path_factory.mktemp("straight"), llama)
    train(recipe, *SETTINGS)
    return hashes(recipe, 6), evaluations(recipe)


def evaluations(recipe: Path) -> list[tuple[int, float]]:
    events = read_events(run_dir(recipe) / "events.jsonl")
    return [(event["step"], event["loss"]) for event in events if event["event"] == "eval"]


@pytest.mark.parametrize(("step", "samples"), [(2, 1), (4, 0), (6, 1)])  # without samples nothing but the loss leaves
def test_an_evaluation_that_was_stopped_is_made_anew(
    tmp_path: Path, llama: Path, straight: tuple[dict[str, str], list[tuple[int, float]]], step: int, samples: int
) -> None:
    settings = (*SETTINGS, f"eval.samples={samples}")
    recipe = write_recipe(tmp_path, llama)
    stop, recorder = StopRequest(), Recorder()
    sinks = Sinks(recorder, StopInside(step, "evaluate", stop))
    with pytest.raises(StoppedBySignal, match=f"saved after step {step} of 6"):
        api.train(load_recipe(recipe, settings), name="tiny", sink=sinks, stop=stop)
    assert values(recorder, "step", "step")[-1] == step
    assert step not in values(recorder, "eval", "step")  # it did not finish what it was asked to leave
    train(recipe, *settings, mode="resume")
    assert hashes(recipe, 6) == straight[0]
    assert evaluations(recipe) == straight[1]  # each once, with the same loss
    best = min(straight[1][1:], key=lambda said: said[1])[0]
    assert delivered_step(run_dir(recipe)) == best


def test_a_request_to_save_is_met_once(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    stop, recorder = StopRequest(), Recorder()

    class HangUp(Recorder):
        def emit(self, event: Event) -> None:
            if event.kind == "step" and event.as_dict()["step"] == 3:
                stop.ask_to_save()

    api.train(load_recipe(recipe, SETTINGS), name="tiny", sink=Sinks(recorder, HangUp()), stop=stop)
    saved = [event.as_dict()["step"] for event in recorder.of("saved") if event.as_dict()["what"] == "checkpoint"]
    assert saved == [3, 6]
