"""Resumed at each of 12 steps, and restarted 11 times in a chain: the same bits as the run that was never stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.events import Event
from qlora.stop import StopRequest
from tests.faults.cases import last_hashes
from tests.faults.forks import Child, Warm, claimed, finished, fork, in_child, warm
from tests.runs import EVERYTHING, write_recipe
from tests.sampling import sampled

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs fork")]

STEPS = 12
KEEP_ALL = {"every_steps": 1, "keep": STEPS + 1}
# Everything that draws random numbers or looks at the model between steps; 4 bit, packed, over the end of an epoch.
ALL_ON = (*EVERYTHING, f"train.max_steps={STEPS}", "lora.r=4")
RECIPES = {
    "everything on": ALL_ON,
    "every default": (f"train.max_steps={STEPS}", "eval.samples=0"),
    "unpacked, 8 bit Lion, constant rate": (
        *(*ALL_ON, "data.packing=false", "train.optimizer=lion_8bit", 'train.lr_scheduler="constant"'),
        *("train.gradient_checkpointing=false", "lora.use_dora=true"),
    ),
}


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[Warm, Path]:
    """A run made ready, and the folder where it ran straight through with every checkpoint kept."""
    place = tmp_path_factory.mktemp("everywhere")
    ready = warm(write_recipe(place, llama), *RECIPES[request.param])
    finished(in_child(ready, place / "straight", **KEEP_ALL))
    return ready, place / "straight"


@pytest.mark.parametrize("run", sampled([*RECIPES][:2], next(iter(RECIPES))), indirect=True)
def test_from_each_step(run: tuple[Warm, Path], tmp_path: Path) -> None:
    ready, straight = run
    wanted = last_hashes(straight, STEPS)
    equal = 0
    for step in range(1, STEPS + 1):
        folder = tmp_path / str(step)
        name = f"step-{step:06d}"
        (folder / "tiny" / "checkpoints").mkdir(parents=True)
        shutil.copytree(straight / "tiny/checkpoints" / name, folder / "tiny/checkpoints" / name)
        # The best adapter lies in the run's folder; here it is that of the straight run's end.
        if (straight / "tiny" / "adapter").exists():
            shutil.copytree(straight / "tiny" / "adapter", folder / "tiny" / "adapter")
        finished(in_child(ready, folder, **KEEP_ALL))
        equal += last_hashes(folder, STEPS) == wanted
    print(f"resumed at each of {STEPS} steps: {equal} of {STEPS} final hashes equal")
    assert equal == STEPS


def test_a_chain_of_restarts(run: tuple[Warm, Path], tmp_path: Path) -> None:
    """Every process does one step, and is then stopped as by a signal."""
    ready, straight = run
    restarts = 0
    while True:
        child = one_step(ready, tmp_path)
        code, said = child.wait(), child.rest()
        assert not any(line.startswith("FAULT") for line in said), said
        if code == 0:
            break
        assert code == 130
        restarts += 1
    assert restarts == STEPS - 1
    assert last_hashes(tmp_path, STEPS) == last_hashes(straight, STEPS)
    for step in range(1, STEPS):
        assert last_hashes(tmp_path, step) == last_hashes(straight, step), step


def one_step(ready: Warm, folder: Path) -> Child:
    def work(say: Callable[[str], None]) -> None:
        from qlora import disk
        from qlora.errors import StoppedBySignal
        from qlora.training import checkpoint, loop

        stop = StopRequest()

        class AfterAStep:
            def emit(self, event: Event) -> None:
                say(event.kind)
                if event.kind == "step" and event.as_dict()["step"] < STEPS:
                    stop.set()

            def close(self) -> None:
                pass

        run_dir = folder / "tiny"
        section = ready.recipe.checkpoint.model_copy(update={"every_steps": 1000, "keep": STEPS + 1})
        recipe = ready.recipe.model_copy(update={"checkpoint": section})
        held = claimed(run_dir, recipe)
        disk.sweep_leftovers(run_dir / "checkpoints")
        try:
            loop.run(ready.job(run_dir, recipe, AfterAStep(), stop), checkpoint.newest(run_dir, AfterAStep()))
        except StoppedBySignal as error:
            raise SystemExit(error.exit_code) from None
        held.release()

    return fork(work)
