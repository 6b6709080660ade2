"""A run whose layers' inputs wait on the host is the run that keeps them on the device, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.step import offload
from qlora.step.offload import Pool
from tests.card import MIB, Card, rehearsal
from tests.runs import EVERYTHING, hashes, train, values, write_recipe
from tests.sampling import sampled

STEPS = 20
ALL = (*EVERYTHING, f"train.max_steps={STEPS}", "train.gradient_checkpointing=true", "checkpoint.every_steps=5")
ON = (*ALL, "memory.offload_activations=true")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input is moved; what comes back to the pool holds no number any more."""
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(offload, "BLOCK_BYTES", 4096)
    take_back = Pool.take_back

    def poisoned(pool: Pool, blocks: list[Tensor]) -> None:
        for block in blocks:
            block.fill_(0xFF)
        take_back(pool, blocks)

    monkeypatch.setattr(Pool, "take_back", poisoned)


@pytest.fixture(scope="module")
def on_device(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, str]:
    """Hashes after 20 steps with packing, accumulation, dropout, noise and evaluation, inputs on the device."""
    recipe = write_recipe(tmp_path_factory.mktemp("device"), llama)
    train(recipe, *ALL)
    return hashes(recipe, STEPS)


def pools(monkeypatch: pytest.MonkeyPatch) -> list[Pool]:
    made: list[Pool] = []
    begin = Pool.__init__

    def noted(pool: Pool, *about: Any) -> None:
        begin(pool, *about)
        if pool.device.type == "cpu":  # not the plan's, which simulates the run
            made.append(pool)

    monkeypatch.setattr(Pool, "__init__", noted)
    return made


def test_twenty_steps(tmp_path: Path, llama: Path, on_device: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, made = write_recipe(tmp_path, llama), pools(monkeypatch)
    recorder = train(recipe, *ON)
    assert hashes(recipe, STEPS) == on_device
    (pool,) = made
    assert pool.blocks and not pool.lent
    said = [text for text in values(recorder, "notice", "message") if "wait on the host" in text]
    assert said == [pool.said], "blocks as many as the dry run made"
    assert values(recorder, "plan", "memory")[0]["settings"]["memory.offload_activations"] is True


@pytest.mark.parametrize("first", [ON, ALL], ids=["offloaded, then not", "not, then offloaded"])
def test_stopped_and_resumed_otherwise(
    tmp_path: Path, llama: Path, on_device: dict[str, str], first: tuple[str, ...]
) -> None:
    recipe = write_recipe(tmp_path, llama)
    train(recipe, *first, stop_after=7)
    train(recipe, *(ALL if first == ON else ON), mode="resume")
    assert hashes(recipe, STEPS) == on_device


def test_some_layers(tmp_path: Path, llama: Path, on_device: dict[str, str]) -> None:
    recipe = write_recipe(tmp_path, llama)
    train(recipe, *ON, "train.gradient_checkpointing=1")
    assert hashes(recipe, STEPS) == on_device


def run_out(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Memory runs out in the copy of that number, and in no other: the dry run makes 4, each step as many."""
    copies = 0
    pairs = offload._pairs

    def counted(x: Tensor, blocks: list[Tensor]) -> Any:
        nonlocal copies
        copies += x.device.type == "cpu"
        if copies == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has 1.00 MiB free.")
        return pairs(x, blocks)

    monkeypatch.setattr(offload, "_pairs", counted)


@pytest.mark.parametrize("at", sampled([9, 10], 10))
def test_memory_runs_out_on_the_way_up_and_on_the_way_down(
    tmp_path: Path, llama: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are done again, fewer at a time, in blocks that are there; the result is that of a run on the device to
    which the same happens at the same micro-batch."""
    settings = ("train.max_steps=3", "train.batch_size=4", "train.micro_batch_size=2", "data.max_length=96")
    settings = (*settings, "data.eval_fraction=0", "train.gradient_checkpointing=true")
    recipe, made = write_recipe(tmp_path / "host", llama), pools(monkeypatch)
    with monkeypatch.context() as patch:
        run_out(patch, at)
        recorder = train(recipe, *settings, "memory.offload_activations=true")
    assert len(recorder.of("recovered")) == 1
    assert "micro-batches of 1 instead of 2 rows" in values(recorder, "recovered", "message")[0]
    (pool,) = made
    assert pool.blocks and not pool.lent
    plain = write_recipe(tmp_path / "device", llama)
    with monkeypatch.context() as patch:
        again = fail_in_step(patch, values(recorder, "recovered", "step")[0])
        other = train(plain, *settings)
    assert again and values(other, "recovered", "step") == values(recorder, "recovered", "step")
    assert hashes(plain, 3) == hashes(recipe, 3)


def fail_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Memory runs out once in the forward pass of that step."""
    from qlora.training.loop import Training

    done: list[int] = []
    gather = Training._micro_steps

    def failing(training: Training, state: Any, batches: Any, weight: float) -> Any:
        if not done and state.step + 1 == max(step, 1):
            done.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has 1.00 MiB free.")
        return gather(training, state, batches, weight)

    monkeypatch.setattr(Training, "_micro_steps", failing)
    return done


def test_on_the_stand_in_card(
    tmp_path: Path, llama: Path, on_device: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams, events and pinned blocks; stopped and resumed; without one wait of the host for a copy."""
    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    settings = ("train.max_steps=4", "data.eval_fraction=0", "train.gradient_checkpointing=true", *EVERYTHING[:6])
    with rehearsal(monkeypatch, Card(total=512 * MIB)) as card:
        train(one, *settings)
        assert not card.calls["Stream.wait_event"]
        train(two, *settings, "memory.offload_activations=true", stop_after=2)
        recorder = train(two, *settings, "memory.offload_activations=true", mode="resume")
        assert card.calls["Stream.wait_event"] and not card.calls["Event.synchronize"]
    assert any("wait on the host" in text for text in values(recorder, "notice", "message"))
    assert hashes(two, 4) == hashes(one, 4)
