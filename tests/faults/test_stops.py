"""A stop inside an evaluation or an answer: what was not finished is done again, once, and nothing else changes."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from qlora import api
from qlora.errors import StoppedBySignal
from qlora.events import Event, Recorder, Sinks
from qlora.model.adapter_folder import delivered_step
from qlora.recipe.reading import load_recipe
from qlora.report.files import read_events
from qlora.stop import StopRequest
from qlora.training.evaluate import RunEvaluation
from tests.runs import hashes, run_dir, train, values, write_recipe
from tests.sampling import sampled

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


# Without samples nothing but the loss leaves.
@pytest.mark.parametrize(("step", "samples"), sampled([(2, 1), (4, 0), (6, 1)], (2, 1), (4, 0)))
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


ENDINGS = (
    *(*SETTINGS, "train.max_steps=2", "eval.every_steps=1", "eval.samples=0", "eval.exact_match_rows=1"),
    *("checkpoint.every_steps=1", "data.packing=false"),
)
BEST, LAST = 1, 2


class AtTheEnd:
    """Asks for a stop at the first event of a kind, with some word, after the last step; damages what is delivered
    before it is looked at, if so."""

    def __init__(self, folder: Path, at: tuple[str, str], damaged: bool, stop: StopRequest) -> None:
        self.folder, self.at, self.damaged, self.stop = folder, at, damaged, stop
        self.seen: dict[tuple[str, str], None] = {}
        self.ended = False

    def emit(self, event: Event) -> None:
        said = event.as_dict()
        self.ended = self.ended or (event.kind == "step" and said["step"] == LAST)
        if not self.ended:
            return
        point = event.kind, str(said.get("task") or said.get("topic") or said.get("what") or "")
        self.seen[point] = None
        if self.damaged and event.kind == "eval" and said["step"] == LAST:
            file = self.folder / "adapter" / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"!")
        if point == self.at:
            self.stop.set()

    def close(self) -> None:
        pass


def weights(recipe: Path) -> tuple[dict[str, str], dict[str, bytes], int | None]:
    """What the last checkpoint holds, and what is delivered."""
    adapter = run_dir(recipe) / "adapter"
    names = ("adapter_model.safetensors", "qlora.json", "README.md")
    return hashes(recipe, LAST), {name: (adapter / name).read_bytes() for name in names}, delivered_step(adapter.parent)


class Ending:
    """The end of one run, as often as it is wanted."""

    def __init__(self, folder: Path, base: Path, damaged: bool) -> None:
        self.recipe, self.kept, self.damaged = write_recipe(folder / "run", base), folder / "kept", damaged
        train(self.recipe, *ENDINGS, stop_after=LAST - 1)
        shutil.copytree(run_dir(self.recipe), self.kept)

    def with_stop(self, *at: str) -> AtTheEnd:
        shutil.rmtree(run_dir(self.recipe))
        shutil.copytree(self.kept, run_dir(self.recipe))
        stop = StopRequest()
        sink = AtTheEnd(run_dir(self.recipe), (at[0], at[1]), self.damaged, stop)
        with suppress(StoppedBySignal):
            api.train(load_recipe(self.recipe, ENDINGS), name="tiny", mode="resume", sink=Sinks(sink), stop=stop)
        return sink


@pytest.fixture
def ending(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Ending:
    """What is delivered is not what was trained last."""
    measured = RunEvaluation.loss
    monkeypatch.setattr(RunEvaluation, "loss", lambda self, step: measured(self, step) + 10 * abs(step - BEST))
    return Ending(tmp_path, llama, request.param)


@pytest.mark.parametrize("ending", [True], indirect=True)
def test_a_stop_after_the_best_was_delivered_again_keeps_the_last_state(ending: Ending) -> None:
    sink = ending.with_stop("notice", "adapter")
    assert ("notice", "adapter") in sink.seen
    stopped = weights(ending.recipe)
    ending.with_stop("", "")
    assert stopped[0] == weights(ending.recipe)[0], "the last checkpoint has the last step's weights"


@pytest.mark.slow
@pytest.mark.parametrize("ending", sampled([False, True], True), indirect=True)
def test_a_stop_at_any_moment_of_the_end_changes_nothing(ending: Ending) -> None:
    straight = ending.with_stop("", "")
    expected = weights(ending.recipe)
    assert expected[2] == BEST and len(straight.seen) > 5
    for point in straight.seen:
        ending.with_stop(*point)
        assert weights(ending.recipe)[0] == expected[0], f"the last checkpoint after a stop at {point}"
        train(ending.recipe, *ENDINGS, mode="resume")
        assert weights(ending.recipe) == expected, f"a stop at {point}"
