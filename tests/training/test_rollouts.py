"""Runs of GRPO: answers are drawn, judged, kept and learned from; a run that goes on draws the same ones again."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import api
from qlora.errors import TrainingStopped
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe
from qlora.training import generations, loop, rollouts
from tests.runs import hashes, run_dir, train, values
from tests.training.grpo_cases import KEYS, kept, lines, write_recipe
from tests.training.preference_cases import notices

ALONE = (*(key for key in KEYS if "eval" not in key), "data.eval_fraction=0", "eval.samples=0")
OFTEN = "train.rewards=['regex:[0-9]']"  # in half of a tiny base's answers of 26 tokens
AGAIN = ("train.num_iterations=2", "train.beta=0.1", "lora.dropout=0.1", "train.temperature=0.8", "lora.r=4")


class Killed(BaseException):
    """What no handler catches, as a process that is gone."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[Path, Recorder]:
    """A run that nothing happened to."""
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), llama)
    return recipe, train(recipe, *KEYS)


def told(recorder: Recorder) -> list[dict[str, Any]]:
    return [event.as_dict() for event in recorder.of("rewards")]


def failing(real: Any, at: int, error: BaseException) -> Any:
    """`real`, whose call of number `at`, from 0, raises."""
    calls = iter(range(10_000))

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise error
        return real(*arguments, **named)

    return call


def test_answers_are_drawn_judged_and_kept(whole: tuple[Path, Recorder]) -> None:
    recipe, recorder = whole
    steps = {event["step"]: event for event in told(recorder) if not event["evaluated"]}
    assert list(steps) == [1, 2, 3, 4, 5, 6] and list(kept(recipe)) == [f"step-{step:06d}.jsonl" for step in steps]
    for step, event in steps.items():
        answers = lines(recipe, step)
        assert [(one["step"], one["number"]) for one in answers] == [(step, number) for number in (0, 1, 2, 3)] * 2
        assert len({one["where"] for one in answers}) == 2 and all("price of lamp" in one["prompt"] for one in answers)
        rewards = [one["reward"] for one in answers]
        assert rewards == [sum(one["rewards"].values()) for one in answers]
        assert event["reward"] == pytest.approx(sum(rewards) / 8) and event["answers"] == 8
        assert list(event["rewards"]) == ["regex:[aeiou]", "exact_match"] == list(answers[0]["rewards"])
        assert event["tokens"] == pytest.approx(sum(len(one["token_ids"]) for one in answers) / 8)
        for group in (answers[:4], answers[4:]):
            assert sum(one["advantage"] for one in group) == pytest.approx(0, abs=1e-6)
            assert all((one["advantage"] > 0) == (one["reward"] > min(one["reward"] for one in group)) for one in group)
        assert event["kl"] >= 0 and event["clipped"] == 0 and event["mismatch"] < 0.05
        assert "logprobs" not in answers[0]
    assert steps[1]["kl"] < 1e-6 < steps[6]["kl"]
    assert len({one["completion"] for one in lines(recipe, 1)}) == 8  # random answers of ten tokens


def test_evaluation_asks_held_out_questions_and_the_best_is_worth_most(whole: tuple[Path, Recorder]) -> None:
    _, recorder = whole
    evaluated = {event["step"]: event for event in told(recorder) if event["evaluated"]}
    assert list(evaluated) == [0, 3, 6] and {event["answers"] for event in evaluated.values()} == {6}
    losses = {event.as_dict()["step"]: event.as_dict()["loss"] for event in recorder.of("eval")}
    assert losses == {step: -event["reward"] for step, event in evaluated.items()}
    assert set(values(recorder, "eval", "perplexity")) == {None}
    assert recorder.of("end")[0].as_dict()["exact_match_before"] == 0.0
    arithmetic = values(recorder, "plan", "arithmetic")[0]
    assert "2 rows × 4 answers = 8 a step = 2 micro-batches of 4" in arithmetic


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path, llama: Path, whole: tuple[Path, Recorder]) -> None:
    recipe = write_recipe(tmp_path, llama)
    first = train(recipe, *KEYS, stop_after=2)
    second = train(recipe, *KEYS, mode="resume")
    assert hashes(recipe, 6) == hashes(whole[0], 6) and kept(recipe) == kept(whole[0])
    assert [*told(first), *told(second)] == told(whole[1])


def test_what_was_drawn_before_a_process_died_is_drawn_again(
    tmp_path: Path, llama: Path, whole: tuple[Path, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between drawing and update: the answers of step 4 are on the disk, its update is not."""
    recipe = write_recipe(tmp_path, llama)
    real = rollouts.Rollouts.before

    def dying(self: Any, state: Any, packs: Any) -> Any:
        state = real(self, state, packs)
        if state.step == 3:
            raise Killed
        return state

    with monkeypatch.context() as patch:
        patch.setattr(rollouts.Rollouts, "before", dying)
        with pytest.raises(Killed):
            train(recipe, *KEYS)
    assert len(kept(recipe)) == 4 and not (run_dir(recipe) / "checkpoints" / "step-000004").exists()
    (run_dir(recipe) / generations.FOLDER / "step-000004.jsonl").write_text("half a li")
    train(recipe, *KEYS, mode="resume")
    assert hashes(recipe, 6) == hashes(whole[0], 6) and kept(recipe) == kept(whole[0])


@pytest.mark.slow
def test_a_run_goes_on_between_two_steps_on_one_drawing(tmp_path: Path, llama: Path) -> None:
    """The model has moved since: the answers and what was known of them are read back."""
    straight, halves = (write_recipe(tmp_path / name, llama) for name in ("one", "two"))
    recorder = train(straight, *KEYS, *AGAIN)
    first = train(halves, *KEYS, *AGAIN, stop_after=3)
    second = train(halves, *KEYS, *AGAIN, mode="resume")
    assert hashes(halves, 6) == hashes(straight, 6) and kept(halves) == kept(straight)
    assert list(kept(halves)) == ["step-000001.jsonl", "step-000003.jsonl", "step-000005.jsonl"]
    assert [*told(first), *told(second)] == told(recorder)
    moved = [event for event in told(recorder) if not event["evaluated"]]
    assert moved[1]["rewards"] == moved[0]["rewards"] and moved[1]["kl"] > moved[0]["kl"]


@pytest.mark.slow
def test_answers_that_are_gone_between_two_steps_are_drawn_anew_and_that_is_said(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    train(recipe, *KEYS, *AGAIN, stop_after=3)
    file = run_dir(recipe) / generations.FOLDER / "step-000003.jsonl"
    file.write_text(file.read_text().replace('"reward": 1.0', '"reward": 2.0'))
    said = notices(train(recipe, *KEYS, *AGAIN, mode="resume"), "rewards")
    assert any("step-000003.jsonl: gone or changed: its rows are answered anew" in one for one in said)
    assert '"reward": 2.0' not in file.read_text()


def test_memory_that_runs_out_in_drawing_halves_what_is_drawn_at_once(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that goes on draws as many: what is drawn follows from its neighbours to the last bit."""
    real, error = rollouts.sampled.draw, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB.")
    recipes = [write_recipe(tmp_path / name, llama) for name in ("one", "two")]
    some = (*ALONE, "train.max_steps=3")
    monkeypatch.setattr(rollouts.sampled, "draw", failing(real, 1, error))
    recorder = train(recipes[0], *some)
    (recovered,) = recorder.of("recovered")
    assert recovered.as_dict()["step"] == 2 and "4 instead of 8 answers at once" in recovered.as_dict()["message"]
    monkeypatch.setattr(rollouts.sampled, "draw", failing(real, 1, error))
    train(recipes[1], *some, stop_after=2)
    seen: list[int] = []
    drawn: list[str] = []

    def watching(model: Any, prompts: Any, names: Any, temperature: float, asked: Any) -> Any:
        seen.append(asked.batch_size)
        drawn.extend(names)
        return real(model, prompts, names, temperature, asked)

    monkeypatch.setattr(rollouts.sampled, "draw", watching)
    train(recipes[1], *some, mode="resume")
    assert sorted(drawn) == [f"42/2/{place}/answer" for place in range(8)]  # by seed, step and place in the step
    assert seen == [4, 4] and hashes(recipes[0], 3) == hashes(recipes[1], 3)


def test_the_longest_drawing_is_tried_before_the_first_step(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the longest question, as long as answers may be; where memory runs out in it, fewer are drawn from then on."""
    tried: list[Any] = []
    drawn: list[tuple[int, int]] = []
    real, draw = rollouts.asking.ask, rollouts.sampled.draw

    def trying(model: Any, asked: Any) -> None:
        tried.append(asked)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB.")
        assert not torch.is_grad_enabled() and not model.training
        real(model, asked)

    def watching(model: Any, prompts: Any, names: Any, temperature: float, asked: Any) -> Any:
        drawn.append((asked.batch_size, max(map(len, prompts))))
        return draw(model, prompts, names, temperature, asked)

    monkeypatch.setattr(rollouts.asking, "ask", trying)
    monkeypatch.setattr(rollouts.sampled, "draw", watching)
    recorder = train(write_recipe(tmp_path, llama), *ALONE)
    (recovered,) = recorder.of("recovered")
    assert recovered.as_dict()["step"] == 0 and "4 instead of 8 answers at once" in recovered.as_dict()["message"]
    assert [(one.rows, one.new, one.drawn) for one in tried] == [(8, 10, 1), (4, 10, 1)]
    assert {rows for rows, _ in drawn} == {4} and max(length for _, length in drawn) <= tried[0].own <= 86


def test_answers_end_where_their_rows_do(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is drawn longer than the room of its shortest question, and what is drawn is the same."""
    draw, rooms = rollouts.sampled.draw, []

    def watching(model: Any, prompts: Any, names: Any, temperature: float, asked: Any) -> Any:
        rooms.append((asked.max_new_tokens, 44 - min(map(len, prompts))))
        found = draw(model, prompts, names, temperature, asked)
        longer = draw(model, prompts, names, temperature, replace(asked, max_new_tokens=40))
        for one, other in zip(found, longer, strict=True):
            room = asked.max_new_tokens
            assert one.token_ids == other.token_ids[:room] and one.logprobs == other.logprobs[:room]
        return found

    monkeypatch.setattr(rollouts.sampled, "draw", watching)
    some = (*ALONE, OFTEN, "data.max_length=44", "train.max_completion_length=40", "train.max_steps=3")
    train(write_recipe(tmp_path, llama), *some)
    assert rooms and all(most == room < 40 for most, room in rooms), rooms


def test_memory_that_runs_out_in_the_update_leaves_the_answers(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers in smaller micro-batches, each counted once."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB.")
    monkeypatch.setattr(loop, "forward_backward", failing(loop.forward_backward, 3, error))  # behind the dry run's two
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, *ALONE, "train.max_steps=2", "train.gradient_checkpointing=true")
    (recovered,) = recorder.of("recovered")
    assert "micro-batches of 2 instead of 4 rows" in recovered.as_dict()["message"]
    tokens = [sum(len(one["token_ids"]) for one in lines(recipe, step)) for step in (1, 2)]
    assert values(recorder, "step", "trained_tokens") == tokens
    assert [event["answers"] for event in told(recorder)] == [8, 8]


def test_what_cannot_be_kept_is_said_once_and_the_run_goes_on(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(generations.Kept, "write", full)
    recorder = train(write_recipe(tmp_path, llama), *ALONE, "train.max_steps=2")
    assert sum("cannot be written (No space left" in said for said in notices(recorder, "rewards")) == 1
    assert len(recorder.of("step")) == 2


def test_rewards_that_tell_nothing_apart_are_said(tmp_path: Path, llama: Path) -> None:
    """With the weight of the reference nothing moves either: the run says so, and delivers no adapter as if it had."""
    recipe = write_recipe(tmp_path, llama)
    recipe.write_text(recipe.read_text().replace("regex:[aeiou]", "regex:[😀]"))
    recorder = Recorder()
    with pytest.raises(TrainingStopped, match="learned nothing"):
        api.train(load_recipe(recipe, KEYS), name=recipe.stem, sink=recorder)
    assert any(
        "in the last 5 steps all answers to a row were worth the same" in one for one in notices(recorder, "rewards")
    )
    assert {event["without_signal"] for event in told(recorder) if not event["evaluated"]} == {1.0}


def test_what_was_learned_from_rewards_is_exported_as_any_adapter(whole: tuple[Path, Recorder]) -> None:
    recorder = Recorder()
    exported = api.merge_and_export(run_dir(whole[0]), to="hf", sink=recorder)
    assert exported.fidelity and exported.fidelity[-1].kl < 0.05  # of what was made; others may be further
    assert any("is the one that was trained" in said for said in notices(recorder, "verify"))
