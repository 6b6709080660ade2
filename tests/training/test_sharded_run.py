"""Processes of which each holds a part of every layer train what processes that hold all of it train, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import DoesNotFit, ModelError, RecipeError
from qlora.gathering import Gathers
from qlora.model import weight_sharding
from qlora.model.load import load_base
from qlora.model.weight_streaming import StreamedWeights
from qlora.recipe.reading import load_recipe
from qlora.training.evaluate import RunEvaluation
from qlora.training.loop import Training
from tests.runs import EVERYTHING, hashes, run_dir, values, write_recipe
from tests.runs import train as train_here
from tests.sampling import sampled
from tests.together import Ended, Hook, events, masters, stops_after, train
from tests.training.cases import poison_slots

LOADED = load_base  # what a run imports lies in this process, from which its processes are forked
STEPS = 20
SETTINGS = (
    *EVERYTHING,
    f"train.max_steps={STEPS}",
    "train.batch_size=5",  # of micro-batches of two rows: three a step, which two processes share unequally
    "checkpoint.every_steps=5",
    "checkpoint.keep=9",
    'report.sinks=["jsonl"]',
)
RESIDENT = (*SETTINGS, "memory.shard_weights=false")
SHARED = (*SETTINGS, "memory.shard_weights=true")
FEW = (*SHARED, "train.max_steps=4", "eval.every_steps=2", "eval.exact_match_rows=0", "checkpoint.every_steps=2")


def ran(recipe: Path, *settings: str, hooks: dict[int, Hook] | None = None, flag: str = "") -> Ended:
    ended = train(recipe, 2, *settings, hooks=hooks, flag=flag)
    assert ended.codes == [0, 0], ended.said
    return ended


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """20 steps of two processes that hold the base, with packing, accumulation, dropout, noise and evaluation."""
    recipe = write_recipe(tmp_path_factory.mktemp("resident"), llama)
    ran(recipe, *RESIDENT)
    return recipe


@pytest.mark.slow
def test_twenty_steps(tmp_path: Path, llama: Path, resident: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    ran(recipe, *SHARED, hooks=dict.fromkeys((0, 1), poison_slots))
    assert hashes(recipe, STEPS) == hashes(resident, STEPS)
    for kind in ("step", "eval", "samples"):
        ones, theirs = ([_numbers(event) for event in events(one, kind)] for one in (resident, recipe))
        assert ones == theirs and (ones or kind == "samples")
    (said,) = [event for event in events(recipe, "notice") if "weights are shared" in event["message"]]
    assert said["count"] == 2
    settings = events(recipe, "plan")[0]["memory"]["settings"]
    assert settings["memory.shard_weights"] is True and settings["train.gradient_checkpointing"] is True


def _numbers(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key in ("step", "loss", "grad_norm", "tuned", "exact_match")}


@pytest.mark.slow
def test_held_then_shared_then_held(tmp_path: Path, llama: Path, resident: Path) -> None:
    """The first stop comes to process 0, the second to process 1 while it shares."""
    recipe = write_recipe(tmp_path, llama)
    first = train(recipe, 2, *RESIDENT, hooks={0: stops_after(6)})
    assert first.codes == [143, 0], first.said
    second = train(recipe, 2, *SHARED, hooks={1: stops_after(13)}, flag="--resume")
    assert second.codes == [143, 0] and "saved after step 13" in second.said[0], second.said
    ran(recipe, *RESIDENT, flag="--resume")
    assert hashes(recipe, STEPS) == hashes(resident, STEPS)


@pytest.mark.slow
def test_the_kept_base_is_written_and_read_by_parts(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What process 0 writes into the cache it gathers, layer by layer; the second start reads it, in both."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    found = []
    for name in ("first", "second"):
        recipe = write_recipe(tmp_path / name, llama)
        ran(recipe, *FEW, "memory.cache=true", "eval.samples=0")
        said = [event["message"] for event in events(recipe, "notice") if event["topic"] == "cache"]
        assert any(("kept in 4 bit" if name == "first" else "read from the cache") in text for text in said), said
        found.append(hashes(recipe, 4))
    assert found[0] == found[1]


@pytest.mark.slow
def test_one_without_micro_batches_takes_part(tmp_path: Path, llama: Path) -> None:
    settings = ("train.batch_size=2", "train.micro_batch_size=2", "data.packing=false", 'memory.embedding="host"')
    found = []
    for shared in ("true", "false"):
        recipe = write_recipe(tmp_path / shared, llama)
        ran(recipe, *FEW, *settings, f"memory.shard_weights={shared}")
        found.append(hashes(recipe, 4))
    assert found[0] == found[1]


def in_layer(number: int, step: int, do: Any) -> Hook:
    """`do` once in this process, as it comes to a layer's forward pass in a step; not in evaluation."""

    def hook() -> None:
        use, gather, now = StreamedWeights.use, Training._micro_steps, []

        def counted(training: Training, state: Any, *rest: Any) -> Any:
            if state.step == step:
                now.append(step)
            return gather(training, state, *rest)

        def using(held: StreamedWeights, layer: int, ahead: int | None) -> None:
            use(held, layer, ahead)
            if layer == number and len(now) == 1:
                now.append(step)
                do()

        Training._micro_steps = counted  # type: ignore[method-assign]
        StreamedWeights.use = using  # type: ignore[method-assign]

    return hook


def run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has 1.00 MiB free.")


@pytest.mark.slow
@pytest.mark.parametrize("rank", sampled([0, 1], 1))
def test_memory_that_runs_out_in_the_middle_of_a_pass_of_one(tmp_path: Path, llama: Path, rank: int) -> None:
    """The others get the layers that they are still to compute; then all do the same rows again, fewer at a time."""
    settings = (*FEW, "train.batch_size=8", "train.micro_batch_size=2", "train.gradient_checkpointing=true")
    found = []
    for shared in ("true", "false"):
        recipe = write_recipe(tmp_path / shared, llama)
        hook = in_layer(1, 2, run_out) if shared == "true" else fails_in_step(2)
        ended = ran(recipe, *settings, f"memory.shard_weights={shared}", hooks={rank: hook})
        assert ended.said[1] == ""
        (said,) = [event["message"] for event in events(recipe, "recovered")]
        assert "micro-batches of 1 instead of 2" in said and ("process 1 of 2" in said) == (rank == 1)
        found.append(hashes(recipe, 4))
    assert found[0] == found[1]


def fails_in_step(step: int) -> Hook:
    def hook() -> None:
        gather, tried = Training._micro_steps, []

        def failing(training: Training, state: Any, *rest: Any) -> Any:
            if state.step == step and not tried:
                tried.append(step)
                run_out()
            return gather(training, state, *rest)

        Training._micro_steps = failing  # type: ignore[method-assign]

    return hook


def broken() -> None:
    raise ModelError("a layer is broken here", "use another base")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "codes", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), [4, -9], "another process of the run is gone"),
        (broken, [4, 2], "process 1 of 2 has failed with exit code 2"),
    ],
    ids=["killed", "failed"],
)
def test_one_that_ends_in_the_middle_of_a_pass(
    tmp_path: Path, llama: Path, do: Any, codes: list[int], words: str
) -> None:
    """All end, with the last completed step whole, from which a run goes on."""
    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *FEW, "checkpoint.every_steps=9", hooks={1: in_layer(1, 3, do)})
    assert ended.codes == codes and words in ended.said[0] and "Traceback" not in ended.said[0], ended.said
    assert json.loads(masters(recipe, 3).with_name("state.json").read_text())["state"]["step"] == 3
    ran(recipe, *FEW, flag="--resume")
    assert [event["step"] for event in events(recipe, "step")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_one_that_is_killed_while_the_first_evaluates(tmp_path: Path, llama: Path) -> None:
    """It serves then. Process 0 is told by its next gather, and saves what is done."""

    def hook() -> None:
        loss = RunEvaluation._loss

        def killing(evaluation: RunEvaluation, step: int) -> float:
            if step == 2:
                (tmp_path / "now").touch()
            return loss(evaluation, step)

        RunEvaluation._loss = killing  # type: ignore[method-assign]

    def dying() -> None:
        agreed = Gathers._agreed

        def dead(gathers: Gathers, *about: Any) -> int:
            if (tmp_path / "now").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return agreed(gathers, *about)

        Gathers._agreed = dead  # type: ignore[method-assign]

    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *FEW, "checkpoint.every_steps=9", hooks={0: hook, 1: dying})
    assert ended.codes == [4, -9] and "another process of the run is gone" in ended.said[0], ended.said
    assert json.loads(masters(recipe, 2).with_name("state.json").read_text())["state"]["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_cannot_hold_its_part(tmp_path: Path, llama: Path, rank: int) -> None:
    def hook() -> None:
        def settle(*_: Any) -> None:
            raise DoesNotFit("this card is too small", "use another")

        weight_sharding.ShardStore.settle = settle  # type: ignore[method-assign]

    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *FEW, hooks={rank: hook})
    assert ended.codes == [3, 3], ended.said
    assert "this card is too small" in ended.said[rank]
    assert f"process {rank} of 2 has failed with exit code 3" in ended.said[1 - rank]
    assert not (run_dir(recipe) / "checkpoints").exists()


def test_layers_are_in_one_place(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    for more, words in (
        (["train.gradient_checkpointing=false"], "memory.shard_weights recomputes every layer"),
        (["memory.stream_weights=true"], "say where the same layers are"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, ["memory.shard_weights=true", *more])
        (problem,) = caught.value.problems
        assert words in problem.what


def test_one_process_holds_all(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train_here(recipe, "train.max_steps=1", "eval.samples=0", "memory.shard_weights=true")
    said = [text for text in values(recorder, "notice", "message") if "shard_weights" in text]
    assert said == ["memory.shard_weights = true: one process holds all of the base"]
