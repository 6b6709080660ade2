"""GRPO by several processes: each draws a part of the answers, process 0 judges, and all learn from the same ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora.model.load import load_base
from qlora.processes import Place
from qlora.training import handing, rollouts
from qlora.training.answered import Answer
from tests.rewards.cases import function_of
from tests.runs import run_dir
from tests.together import Hook, apart, events, stops_after, train
from tests.training.grpo_cases import KEYS, kept, lines, write_recipe
from tests.training.wires import Held

LOADED = load_base  # what a run imports lies in this process, from which its processes are forked
SHARED = (
    *KEYS,
    "train.batch_size=4",
    "train.num_generations=8",  # 32 answers, which one process and two draw 16 at once
    "train.num_iterations=2",
    "train.max_steps=4",
    "train.beta=0.1",
    "train.temperature=0.8",
    "lora.dropout=0.1",
    "eval.every_steps=2",
    'train.optimizer="adamw"',
    'report.sinks=["jsonl"]',
)
BLIND = (*(key for key in SHARED if "eval" not in key), "train.max_steps=2", "data.eval_fraction=0", "eval.samples=0")
LETTERS = 'train.rewards=["regex:[aeiou]", "regex:s", "regex:n"]'  # which tell random answers apart


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A run of one process."""
    recipe = write_recipe(tmp_path_factory.mktemp("alone"), llama)
    assert train(recipe, 1, *SHARED, LETTERS).codes == [0]
    return recipe


def runs_out_drawing() -> None:
    """In this process memory runs out as it first draws."""
    draw, tried = rollouts.sampled.draw, []

    def failing(*arguments: object) -> object:
        if not tried:
            tried.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
        return draw(*arguments)  # type: ignore[arg-type]

    rollouts.sampled.draw = failing  # type: ignore[assignment]


@pytest.mark.slow
def test_two_processes_draw_judge_and_end_as_one_does(tmp_path: Path, llama: Path, alone: Path) -> None:
    """Two drawings, two steps on each, KL, dropout and a temperature; the first drawing is the same file."""
    some = write_recipe(tmp_path, llama)
    ended = train(some, 2, *SHARED, LETTERS)
    assert ended.codes == [0, 0] and ended.said[1] == "", ended.said
    assert list(kept(some)) == ["step-000001.jsonl", "step-000003.jsonl"]
    assert (run_dir(some) / "generations" / "step-000001.jsonl").read_bytes() == (
        run_dir(alone) / "generations" / "step-000001.jsonl"
    ).read_bytes()
    for ours, theirs in zip(lines(alone, 3), lines(some, 3), strict=True):
        for key in ("row", "token_ids", "ended", "reward", "advantage"):
            assert ours[key] == theirs[key], key
        for key in ("logprobs", "reference", "old"):
            assert theirs[key] == pytest.approx(ours[key], abs=1e-4) and ours[key], key
    assert len({one["advantage"] for one in lines(alone, 1)}) > 3
    assert apart(alone, some, 4) <= 2e-6
    told, its = events(alone, "rewards"), events(some, "rewards")
    assert [event["step"] for event in told] == [event["step"] for event in its] == [0, 1, 2, 2, 3, 4, 4]
    for mine, other in zip(told, its, strict=True):
        for key in ("answers", "reward", "rewards", "tokens", "cut", "without_signal"):
            assert other[key] == mine[key], key
        for key in ("kl", "clipped", "mismatch"):
            assert other[key] == (mine[key] if mine[key] is None else pytest.approx(mine[key], abs=2e-5)), key
    assert told[5]["kl"] > 0 and told[5]["mismatch"] > 0


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_them(tmp_path: Path, llama: Path, alone: Path) -> None:
    """Stopped between two steps on one drawing, whose answers are read back and handed to the others."""
    some = write_recipe(tmp_path, llama)
    assert train(some, 2, *SHARED, LETTERS, hooks={0: stops_after(1)}).codes == [143, 0]
    assert train(some, 4, *SHARED, LETTERS, flag="--resume").codes == [0] * 4
    assert apart(alone, some, 4) <= 2e-6
    assert not any("gone or changed" in event["message"] for event in events(some, "notice"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_where_memory_runs_out_all_draw_fewer_at_once(tmp_path: Path, llama: Path, rank: int) -> None:
    some = write_recipe(tmp_path, llama)
    hooks: dict[int, Hook] = {rank: runs_out_drawing}
    # The dry run draws nothing; the first to draw are both processes, for the first step.
    ended = train(some, 2, *BLIND, LETTERS, hooks=hooks)
    assert ended.codes == [0, 0], ended.said
    (said,) = [event["message"] for event in events(some, "recovered")]
    assert "8 instead of 16 answers at once; the same rows are done again" in said
    assert len(lines(some, 1)) == 32


@pytest.mark.slow
def test_from_an_adapter_the_reference_is_that_of_process_0(tmp_path: Path, llama: Path) -> None:
    """It lies in the run's folder, which the others never see; what they train is theirs again behind it."""
    before, one, some = (write_recipe(tmp_path / name, llama) for name in ("before", "one", "some"))
    assert train(before, 1, *SHARED, LETTERS, "train.max_steps=2").codes == [0]
    keys = (*SHARED, LETTERS, f'lora.from="{run_dir(before)}"', "lora.dropout=0")
    assert train(one, 1, *keys).codes == [0]
    assert train(some, 2, *keys).codes == [0, 0]
    assert apart(one, some, 4) <= 2e-6
    steps = [event for event in events(some, "rewards") if not event["evaluated"]]
    assert steps[0]["kl"] < 1e-5 < steps[2]["kl"] / 10


@pytest.mark.slow
def test_a_function_judges_in_process_0_alone(tmp_path: Path, llama: Path) -> None:
    source = (
        "import os\nfrom pathlib import Path\n\ndef score(completions):\n"
        f"    with Path({str(tmp_path / 'asked')!r}).open('a') as file:\n"
        "        file.write(f'{os.getpid()} {len(completions)}\\n')\n"
        "    return [len(one) for one in completions]\n"
    )
    some, function = write_recipe(tmp_path, llama), function_of(tmp_path, source)
    ended = train(some, 2, *BLIND, "train.rewards=[]", flag=f"--rewards={function}")
    assert ended.codes == [0, 0], ended.said
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert len({pid for pid, _ in asked}) == 1 and [int(count) for _, count in asked] == [20, 32]
    assert json.loads((run_dir(some) / "rewards.json").read_text())["functions"]


def test_answers_arrive_as_they_were_judged() -> None:
    """All that a step reads of them, bit for bit; a prompt is looked up, what each reward said stays in process 0."""
    prompts = {3: (5, 6), 9: (7,)}
    answers = [
        Answer(3, 0, (5, 6), (1, 2), True, (-0.1, -2.0 / 3), (1.0,), 1.0, 0.7, (-0.3, -0.4), (-0.11, -0.6)),
        Answer(9, 1, (7,), (), False, (), (0.0,), 0.0, -1.2),
        Answer(3, 1, (5, 6), (2**30,), False, (-1e-9,), (0.25,), 0.25, 1e-17),
    ]
    channel, words = Held(), list[dict[str, int]]()
    handing.give_answers(channel, words.append, (4, answers))  # type: ignore[arg-type]
    channel.place = Place(1, 2, 1, 2)
    found = handing.taken_answers(channel, words[0], prompts.__getitem__)  # type: ignore[arg-type]
    assert words == [{"do": "answers", "first": 4, "size": 37}]
    assert found == [replace(answer, rewards=()) for answer in answers]


@pytest.mark.slow
def test_a_base_that_none_of_them_holds_draws_too(tmp_path: Path, llama: Path) -> None:
    """The longest drawing is tried by process 0 alone, for which the other gives its parts of the layers."""
    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *KEYS, "memory.shard_weights=true", "train.gradient_checkpointing=true")
    assert ended.codes == [0, 0], ended.said
    assert len(kept(recipe)) == 6
