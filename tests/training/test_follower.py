"""Two and four processes train what one trains, one that fails ends all with a whole state, any number goes on."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import DoesNotFit
from qlora.memory.changes import changed
from qlora.model import compiled
from qlora.model.load import load_base
from qlora.training import channel, exchanging, follower
from qlora.training.follower import Following
from qlora.training.loop import Training
from tests.runs import hashes, run_dir, write_recipe
from tests.sampling import sampled
from tests.together import Ended, Hook, apart, events, masters, runs_out_at, stops_after, train

LOADED = load_base  # what a run imports lies in this process, from which its processes are forked
STEPS = 6
# Rows of different lengths, dropout and noise, and a step whose micro-batches two and four processes share unequally.
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.batch_size=5",
    "train.learning_rate=1e-3",
    'train.optimizer="adamw"',
    "lora.dropout=0.1",
    "train.neftune_alpha=5.0",
    "data.max_length=96",
    "data.eval_fraction=0.2",
    "eval.every_steps=3",
    "eval.samples=1",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
    'report.sinks=["jsonl"]',
)
FAST = (*SETTINGS, "eval.samples=0", "eval.every_steps=100")


def together(folder: Path, base: Path, count: int, *more: str, hooks: dict[int, Hook] | None = None) -> Path:
    recipe = write_recipe(folder, base)
    ended = train(recipe, count, *SETTINGS, *more, hooks=hooks)
    assert ended.codes == [0] * count, ended.said
    assert ended.said[1:] == [""] * (count - 1)
    return recipe


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Path]:
    """What one process makes of it, packed and not."""
    made = {}
    for packing in ("true", "false"):
        made[packing] = together(tmp_path_factory.mktemp("alone"), llama, 1, f"data.packing={packing}")
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "packing"), sampled([(2, "true"), (2, "false"), (4, "true"), (4, "false")], (2, "true"), (4, "false"))
)
def test_they_end_where_one_does(tmp_path: Path, llama: Path, alone: dict[str, Path], count: int, packing: str) -> None:
    recipe = together(tmp_path, llama, count, f"data.packing={packing}")
    assert apart(alone[packing], recipe, 2) <= 1e-6 and apart(alone[packing], recipe, STEPS) <= 1e-6
    for kind, keys in (("step", ("step", "tokens", "trained_tokens", "learning_rate")), ("eval", ("step", "rows"))):
        ones, theirs = events(alone[packing], kind), events(recipe, kind)
        assert [[event[key] for key in keys] for event in ones] == [[event[key] for key in keys] for event in theirs]
    assert [event["loss"] for event in events(recipe, "step")] == pytest.approx(
        [event["loss"] for event in events(alone[packing], "step")], abs=1e-5
    )
    said = [event for event in events(recipe, "notice") if event["topic"] == "processes"]
    assert len(said) == 1 and said[0]["count"] == count


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ("memory.stream_weights=true", "memory.offload_activations=true"),
        ('lora.init="eva"',),
        pytest.param(("lora.use_dora=true",), marks=pytest.mark.every),
        ('lora.modules_to_save=["lm_head"]', "train.gradient_checkpointing=true"),
    ],
)
def test_so_do_other_ways_to_train(tmp_path: Path, llama: Path, keys: tuple[str, ...]) -> None:
    """Where weights lie and what is trained is each process's own, and begins as process 0 begins."""
    one = together(tmp_path / "one", llama, 1, "train.max_steps=3", "eval.samples=0", *keys)
    two = together(tmp_path / "two", llama, 2, "train.max_steps=3", "eval.samples=0", *keys)
    assert apart(one, two, 3) <= 1e-6


def through_a_plain_backend() -> None:
    compiled.BACKEND = "aot_eager"


@pytest.mark.slow
def test_layers_are_compiled_in_all_of_them(tmp_path: Path, llama: Path) -> None:
    """As in one process; a model that some of them did not compile would train too, with other roundings."""
    keys = ("train.max_steps=2", "eval.samples=0", "model.compile=true", "lora.dropout=0", "train.neftune_alpha=0")
    counted = tmp_path / "counted"

    def hook() -> None:
        through_a_plain_backend()
        real = compiled.put_in

        def put_in(*arguments: Any) -> None:
            with counted.open("a") as file:
                file.write("compiled\n")
            real(*arguments)

        compiled.put_in = put_in

    one = together(tmp_path / "one", llama, 1, *keys, hooks={0: through_a_plain_backend})
    two = together(tmp_path / "two", llama, 2, *keys, hooks={0: hook, 1: hook})
    assert counted.read_text().split() == ["compiled"] * 2
    assert apart(one, two, 2) <= 1e-6


@pytest.mark.slow
def test_they_go_on_with_an_adapter(tmp_path: Path, llama: Path, alone: dict[str, Path]) -> None:
    keys = ("train.max_steps=2", "eval.samples=0", f'lora.from="{run_dir(alone["true"])}"')
    one, two = (together(tmp_path / str(count), llama, count, *keys) for count in (1, 2))
    assert apart(one, two, 2) <= 1e-6


def at_step(step: int, do: Any) -> Hook:
    """`do` in a follower, as it begins to compute its part of a step."""

    def hook() -> None:
        compute = Following.compute

        def doing(training: Following, word: Any) -> Any:
            if word["step"] == step:
                do(training)
            return compute(training, word)

        Following.compute = doing  # type: ignore[method-assign]

    return hook


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_them(tmp_path: Path, llama: Path, alone: dict[str, Path]) -> None:
    """2, then 1, then 4; the first stop comes to process 0, and the second to the only one."""
    recipe = write_recipe(tmp_path, llama)
    first = train(recipe, 2, *SETTINGS, hooks={0: stops_after(2)})
    assert first.codes == [143, 0] and "saved after step 2 of 6" in first.said[0], first.said
    second = train(recipe, 1, *SETTINGS, hooks={0: stops_after(4)}, flag="--resume")
    assert second.codes == [143], second.said
    third = train(recipe, 4, *SETTINGS, flag="--resume")
    assert third.codes == [0] * 4, third.said
    assert apart(alone["true"], recipe, STEPS) <= 1e-6
    assert [event["step"] for event in events(recipe, "step")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_with_the_same_number_of_them_it_goes_on_bit_for_bit(tmp_path: Path, llama: Path) -> None:
    """The stop comes to process 1, which says so where gradients are summed."""
    settings = (*SETTINGS, 'train.optimizer="paged_adamw_8bit"', "data.packing=false")
    straight = together(tmp_path / "straight", llama, 2, *settings)
    recipe = write_recipe(tmp_path / "stopped", llama)
    first = train(recipe, 2, *settings, hooks={1: stops_after(3)})
    assert first.codes == [143, 0] and "stopped by SIGTERM: saved after step 3 of 6" in first.said[0], first.said
    assert train(recipe, 2, *settings, flag="--resume").codes == [0, 0]
    assert hashes(recipe, STEPS) == hashes(straight, STEPS)


def lost(ended: Ended, recipe: Path, code: int, words: str) -> None:
    """Process 0 has ended with a word and a whole state of step 3."""
    assert ended.codes[0] == code and words in ended.said[0] and "Traceback" not in ended.said[0], ended.said
    assert json.loads(masters(recipe, 3).with_name("state.json").read_text())["state"]["step"] == 3


@pytest.mark.slow
def test_one_that_is_killed_ends_all_with_the_last_step_saved(
    tmp_path: Path, llama: Path, alone: dict[str, Path]
) -> None:
    recipe = write_recipe(tmp_path, llama)
    kill = at_step(3, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    ended = train(recipe, 2, *SETTINGS, hooks={1: kill})
    assert ended.codes[1] == -9
    lost(ended, recipe, 4, "another process of the run is gone")
    assert train(recipe, 1, *SETTINGS, flag="--resume").codes == [0]
    assert apart(alone["true"], recipe, STEPS) <= 1e-6


@pytest.mark.slow
def test_one_that_hangs_is_waited_for_no_longer_than_is_said(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "WAIT_SECONDS", 5)
    recipe = write_recipe(tmp_path, llama)
    # It comes back when process 0 has gone, and ends by itself.
    hang = at_step(3, lambda _: signal.sigtimedwait([], 12))
    ended = train(recipe, 2, *FAST, hooks={1: hang})
    lost(ended, recipe, 4, "no answer for 5 s")
    assert ended.codes[1] == 4 and "process 1 of 2: another process of the run is gone" in ended.said[1]


@pytest.mark.slow
def test_without_the_first_the_others_end_and_its_checkpoint_is_whole(tmp_path: Path, llama: Path) -> None:
    def hook() -> None:
        step = Training.step

        def killing(training: Training, state: Any) -> Any:
            if state.step == 3:
                training.checkpointer.saving.settle()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(training, state)

        Training.step = killing  # type: ignore[method-assign]

    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *FAST, hooks={0: hook})
    assert ended.codes == [-9, 4] and "another process of the run is gone" in ended.said[1], ended.said
    assert train(recipe, 2, *FAST, flag="--resume").codes == [0, 0]
    assert [event["step"] for event in events(recipe, "step")][-4:] == [3, 4, 5, 6]


@pytest.mark.slow
def test_memory_that_runs_out_in_one_makes_all_of_them_smaller(tmp_path: Path, llama: Path) -> None:
    """As it makes the only process of a run smaller, at the same step."""
    hook = partial(runs_out_at, 2)
    settings = (*FAST, "train.batch_size=8", "train.micro_batch_size=2", "train.gradient_checkpointing=true")
    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    assert train(one, 1, *settings, hooks={0: hook}).codes == [0]
    ended = train(two, 2, *settings, hooks={1: hook})
    assert ended.codes == [0, 0] and ended.said[1] == "", ended.said
    said = [event["message"] for event in events(two, "recovered")]
    assert len(said) == 1 and "process 1 of 2" in said[0] and "micro-batches of 1 instead of 2" in said[0]
    assert apart(one, two, STEPS) <= 1e-6


@pytest.mark.slow
def test_one_that_cannot_hold_its_part_is_named_with_exit_code_3(tmp_path: Path, llama: Path) -> None:
    def hook() -> None:
        def prepare_job(*_: Any) -> Any:
            raise DoesNotFit("this card is too small", "use another")

        follower.prepare_job = prepare_job  # type: ignore[assignment]

    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *FAST, hooks={1: hook})
    assert ended.codes == [3, 3] and "process 1 of 2 has failed with exit code 3" in ended.said[0], ended.said
    assert "this card is too small" in ended.said[1] and not (run_dir(recipe) / "checkpoints").exists()


@pytest.mark.slow
def test_weights_that_are_not_the_same_any_more_end_the_run(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanging, "SAME_EVERY", 3)
    recipe = write_recipe(tmp_path, llama)
    change = at_step(3, lambda training: training.optimizer._master.add_(1e-7))
    ended = train(recipe, 2, *FAST, hooks={1: change})
    lost(ended, recipe, 4, "step 3: the weights of process 1 are not those of process 0")


@pytest.mark.slow
def test_another_machine_s_other_rows_are_refused(tmp_path: Path, llama: Path) -> None:
    def hook() -> None:
        recipe_of = follower._recipe

        def other(word: Any) -> Any:
            (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("lamp 3", "lamp x"))
            return recipe_of(word)

        follower._recipe = other

    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *FAST, hooks={1: hook})
    assert ended.codes == [4, 2] and "process 1 of 2: the rows" in ended.said[1], ended.said


@pytest.mark.slow
def test_another_model_than_the_first_process_trains_is_refused(tmp_path: Path, llama: Path) -> None:
    def hook() -> None:
        recipe_of = follower._recipe
        follower._recipe = lambda word: changed(recipe_of(word), {"lora.r": 4})

    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *FAST, hooks={1: hook})
    assert ended.codes == [4, 4] and "other names or shapes" in ended.said[1], ended.said
