"""What is not finite never reaches a weight, its rows are named; losses that jump and adapters that sleep are said."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.batch import Batch
from qlora.errors import TrainingStopped
from qlora.step import forward
from qlora.training import health, loop, step_batches
from tests.runs import hashes, train, values, write_recipe
from tests.sampling import sampled

MICRO = 4
SETTINGS = (
    *("train.max_steps=5", f"train.batch_size={MICRO}", "train.micro_batch_size=1", "data.max_length=32"),
    *("data.packing=false", "lora.r=4", "eval.every_steps=100", "eval.samples=0", "train.optimizer=adamw_8bit"),
    *("checkpoint.every_steps=1", "checkpoint.keep=9", "data.eval_fraction=0", "train.gradient_checkpointing=false"),
)
BAD_STEP = 2  # counted from 0: the third


@pytest.fixture(autouse=True)
def steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are counted from step 1: nothing is tried before it."""
    monkeypatch.setattr(loop.Training, "dry_run", lambda self, state: None)


class Spoiler:
    """Stands in for the step's forward and backward, and spoils one micro-batch of one step."""

    def __init__(self, what: str, micro: int, value: float) -> None:
        self.what, self.micro, self.value = what, micro, value
        self.calls = 0
        self.rows: list[int] = []

    def __call__(
        self, parts: Any, batch: Batch, objective: Any, step_weight: float, neftune_alpha: float = 0.0
    ) -> torch.Tensor:
        step, micro = divmod(self.calls, MICRO)
        self.calls += 1
        if (step, micro) != (BAD_STEP, self.micro):
            return forward.forward_backward(parts, batch, objective, step_weight, neftune_alpha)
        if self.what == "gradient":
            hooked = next(p for n, p in parts.trunk.named_parameters() if p.requires_grad and "lora_B" in n)
            spoil = torch.zeros_like(hooked)
            spoil.view(-1)[3] = self.value
            handle = hooked.register_hook(lambda gradient: gradient + spoil)
            loss = forward.forward_backward(parts, batch, objective, step_weight, neftune_alpha)
            handle.remove()
            return loss
        loss = forward.batch_loss(parts, batch, objective, neftune_alpha) * self.value
        (loss / step_weight).backward()
        return loss.detach()


@pytest.mark.parametrize("value", sampled([math.nan, math.inf, -math.inf], math.nan))
@pytest.mark.parametrize(
    ("what", "micro"), [("loss", 0), ("loss", MICRO - 1), ("gradient", 1), ("gradient", MICRO - 1)]
)
def test_weights_and_moments_stay_and_the_rows_are_named(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, what: str, micro: int, value: float
) -> None:
    recipe = write_recipe(tmp_path, llama)
    monkeypatch.setattr(loop, "forward_backward", Spoiler(what, micro, value))
    recorder = train(recipe, *SETTINGS)
    assert hashes(recipe, BAD_STEP) == hashes(recipe, BAD_STEP + 1)  # adapter, masters, moments: the same bits
    assert hashes(recipe, BAD_STEP + 1) != hashes(recipe, BAD_STEP + 2)
    assert values(recorder, "step", "step") == [1, 2, 4, 5]
    (message,) = values(recorder, "recovered", "message")
    named = message.partition("its rows: ")[2].split(", ")
    assert all(name.startswith("rows.jsonl:") for name in named)
    # A loss tells its own micro-batch's row; a gradient that is not finite may be of any row of the step.
    assert len(named) == (1 if what == "loss" else MICRO)
    assert [m for m in values(recorder, "notice", "message") if "skipped" in m] == [
        "steps skipped, their numbers were not finite"
    ]


def test_a_skipped_step_costs_a_later_one_nothing(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bad step left in gradients is thrown away: the next step is what it would be after a step of nothing."""
    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    monkeypatch.setattr(loop, "forward_backward", Spoiler("loss", 0, float("nan")))
    train(one, *SETTINGS)
    monkeypatch.setattr(loop, "forward_backward", Spoiler("gradient", 2, float("nan")))
    train(two, *SETTINGS)
    assert hashes(one, 5) == hashes(two, 5)


def test_a_micro_batch_without_trained_tokens_adds_nothing(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of four, its weights taken away: the step is that of the other three."""
    real = step_batches.collate
    found: dict[str, list[torch.Tensor]] = {}

    def losses_of(name: str, calls: set[int]) -> None:
        numbers = iter(range(10_000))

        def collate(*arguments: Any) -> Batch:
            batch = real(*arguments)
            if next(numbers) not in calls:
                return batch
            empty = torch.zeros_like(batch.loss_weights_BS)
            return Batch(
                *(getattr(batch, f) for f in ("input_ids_BS", "position_ids_BS", "document_ids_BS", "targets_BS")),
                empty,
                batch.trained_T[:0],
            )

        recipe = write_recipe(tmp_path / name, llama)
        monkeypatch.setattr(step_batches, "collate", collate)
        recorder = train(recipe, *SETTINGS, "train.max_steps=1", *(("train.learning_rate=1e-4",)))
        found[name] = [torch.tensor(values(recorder, "step", key)) for key in ("loss", "grad_norm", "trained_tokens")]

    losses_of("none", set())
    losses_of("one", {1})
    assert all(torch.isfinite(value).all() for value in found["one"])
    assert found["one"][2] < found["none"][2] and found["one"][0] != found["none"][0]


def test_a_step_without_any_trained_token_changes_nothing(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, numbers = step_batches.collate, iter(range(10_000))

    def collate(*arguments: Any) -> Batch:
        batch = real(*arguments)
        if next(numbers) // MICRO != 1:
            return batch
        empty = torch.zeros_like(batch.loss_weights_BS)
        return Batch(
            batch.input_ids_BS,
            batch.position_ids_BS,
            batch.document_ids_BS,
            batch.targets_BS,
            empty,
            batch.trained_T[:0],
        )

    recipe = write_recipe(tmp_path, llama)
    monkeypatch.setattr(step_batches, "collate", collate)
    recorder = train(recipe, *SETTINGS)
    assert values(recorder, "step", "step") == [1, 2, 3, 4, 5]
    assert values(recorder, "step", "loss")[1] == 0.0 and values(recorder, "step", "grad_norm")[1] == 0.0
    assert hashes(recipe, 1) == hashes(recipe, 2)


# --- losses that jump ------------------------------------------------------------------------------------------------


def test_a_spike_is_said_and_counted_over_a_resume(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Jump(Spoiler):
        def __call__(self, *arguments: Any) -> torch.Tensor:
            self.calls += 1
            loss = forward.forward_backward(*arguments)
            return loss * 50 if self.calls in (25, 26) else loss

    monkeypatch.setattr(health, "TREND_STEPS", 5)
    recipe = write_recipe(tmp_path, llama)
    settings = (*SETTINGS, "train.max_steps=14", "train.batch_size=2", "checkpoint.every_steps=6")
    monkeypatch.setattr(loop, "forward_backward", Jump("", 0, 0.0))
    recorder = train(recipe, *settings)
    assert next(m for m in values(recorder, "notice", "message") if "spike" in m).startswith("spike at step 13")
    jump = Jump("", 0, 0.0)
    jump.calls = 24
    monkeypatch.setattr(loop, "forward_backward", jump)
    shutil.rmtree(recipe.parent / "runs" / "tiny" / "checkpoints" / "step-000014")
    again = train(recipe, *settings, mode="resume")
    assert values(again, "step", "step")[0] == 13
    assert next(m for m in values(again, "notice", "message") if "spike" in m).startswith("spike at step 13")


# --- adapters that sleep ---------------------------------------------------------------------------------------------


def test_an_adapter_without_gradient_is_an_error(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hook lost, its layer bypassed: the loss falls all the same, and nobody would see it."""
    real = forward.forward_backward

    def deaf(parts: Any, *rest: Any) -> torch.Tensor:
        handles = [
            parameter.register_hook(torch.zeros_like)
            for name, parameter in parts.trunk.named_parameters()
            if parameter.requires_grad and "layers.1.mlp.up_proj" in name
        ]
        loss = real(parts, *rest)
        for handle in handles:
            handle.remove()
        return loss

    monkeypatch.setattr(loop, "forward_backward", deaf)
    with pytest.raises(TrainingStopped, match=r"1 of 14 adapted modules .*layers\.1\.mlp\.up_proj never had a grad"):
        train(write_recipe(tmp_path, llama), *SETTINGS)


def test_an_adapter_that_did_not_move_is_an_error(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.AdapterOptimizer.step

    def step(self: Any, rate: float) -> None:
        held = {
            name: master.detach().clone() for name, master in self.masters.items() if "layers.0.self_attn.k" in name
        }
        real(self, rate)
        for name, before in held.items():
            self.masters[name].data.copy_(before)

    monkeypatch.setattr(loop.AdapterOptimizer, "step", step)
    with pytest.raises(TrainingStopped, match=r"layers\.0\.self_attn\.k_proj did not move") as stopped:
        train(write_recipe(tmp_path, llama), *SETTINGS)
    assert stopped.value.exit_code == 4


def test_what_moved_in_an_earlier_life_has_moved(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    train(recipe, *SETTINGS)
    again = train(recipe, *SETTINGS, mode="resume")
    assert values(again, "end", "reason") == ["finished"]
