"""What two processes measure is what one measures: losses to the last bit, the same answers; and nobody hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.model import generate
from qlora.model.load import load_base
from qlora.training import measuring
from tests.runs import run_dir, write_recipe, write_rows
from tests.together import Hook, apart, events, train

LOADED = load_base  # what a run imports lies in this process, from which its processes are forked
SETTINGS = (
    "train.max_steps=2",
    "train.batch_size=4",
    "train.learning_rate=1e-3",
    'train.optimizer="adamw"',
    "data.max_length=96",
    "data.eval_fraction=0.5",
    "data.packing=false",
    "eval.every_steps=1",
    "eval.samples=1",
    "eval.exact_match_rows=20",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    'report.sinks=["jsonl"]',
)


def recipe_in(folder: Path, base: Path) -> Path:
    recipe = write_recipe(folder, base)
    write_rows(folder / "rows.jsonl", 44)
    return recipe


def counted(into: Path) -> Hook:
    """The process writes down each micro-batch that it measures and each batch of prompts that it answers."""

    def hook() -> None:
        loss, greedy = measuring.summed_loss, generate.greedy

        def told(real: Any, name: str) -> Any:
            def call(*args: Any, **named: Any) -> Any:
                with into.open("a") as file:
                    file.write(f"{name}\n")
                return real(*args, **named)

            return call

        measuring.summed_loss = told(loss, "loss")  # type: ignore[attr-defined]
        generate.greedy = told(greedy, "answers")

    return hook


@pytest.mark.slow
def test_figures_are_those_of_one_process(tmp_path: Path, llama: Path) -> None:
    one, two = recipe_in(tmp_path / "one", llama), recipe_in(tmp_path / "two", llama)
    assert train(one, 1, *SETTINGS, "train.micro_batch_size=1").codes == [0]
    hooks = {rank: counted(tmp_path / str(rank)) for rank in range(2)}
    ended = train(two, 2, *SETTINGS, "train.micro_batch_size=1", hooks=hooks)
    assert ended.codes == [0, 0] and ended.said[1] == "", ended.said
    ones, theirs = events(one, "eval"), events(two, "eval")
    # Weights are equal before the first step: so are figures, and the loss to the last bit.
    assert ones[0]["loss"] == theirs[0]["loss"] and len(ones) == len(theirs)
    assert [event["loss"] for event in theirs] == pytest.approx([event["loss"] for event in ones], abs=1e-6)
    assert [event["exact_match"] for event in theirs] == [event["exact_match"] for event in ones]
    assert [event["tuned"] for event in events(two, "sample")] == [event["tuned"] for event in events(one, "sample")]
    assert apart(one, two, 2) <= 1e-6
    did = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    # 22 micro-batches in 3 evaluations; 20 questions, 16 at once, twice; the samples are one batch, asked by process 0.
    assert [words.count("loss") for words in did] == [33, 33]
    assert [words.count("answers") for words in did] == [2 + 3, 2]


def failing(calls: int, error: Any) -> Hook:
    """The process's so-manieth micro-batch of an evaluation does `error`."""

    def hook() -> None:
        real, made = measuring.summed_loss, []

        def loss(*args: Any) -> Any:
            made.append(1)
            if len(made) == calls:
                error()
            return real(*args)

        measuring.summed_loss = loss  # type: ignore[attr-defined]

    return hook


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")


FEW = (*SETTINGS, "eval.exact_match_rows=0", "eval.samples=0", "train.micro_batch_size=2")


@pytest.mark.slow
def test_memory_that_runs_out_in_one_makes_all_of_them_measure_anew(tmp_path: Path, llama: Path) -> None:
    recipe = recipe_in(tmp_path, llama)
    ended = train(recipe, 2, *FEW, "train.gradient_checkpointing=true", hooks={1: failing(3, no_memory)})
    assert ended.codes == [0, 0] and ended.said[1] == "", ended.said
    (said,) = [event["message"] for event in events(recipe, "recovered")]
    assert "process 1 of 2" in said and "micro-batches of 1 instead of 2" in said
    assert len(events(recipe, "eval")) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "codes"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), [143, 0]),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), [4, -9]),
    ],
)
def test_one_that_leaves_an_evaluation_ends_the_run_with_its_step_saved(
    tmp_path: Path, llama: Path, error: Any, codes: list[int]
) -> None:
    """In the evaluation after step 1; what was measured of it is thrown away, and the run goes on alone."""
    recipe = recipe_in(tmp_path, llama)
    ended = train(recipe, 2, *FEW, hooks={1: failing(8, error)})
    assert ended.codes == codes and "Traceback" not in "".join(ended.said), ended.said
    assert [event["step"] for event in events(recipe, "eval")] == [0]
    assert (run_dir(recipe) / "checkpoints" / "step-000001").is_dir()
    assert train(recipe, 1, *FEW, flag="--resume").codes == [0]
    assert [event["step"] for event in events(recipe, "eval")] == [0, 1, 2]
