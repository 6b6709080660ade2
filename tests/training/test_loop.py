"""What a run does besides its steps: skips what is not finite, keeps the best adapter, stops early, reports."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora.errors import TrainingStopped
from qlora.model import adapters, lora_functions
from qlora.recipe.reading import load_recipe
from qlora.step import forward
from qlora.training import loop
from tests.runs import hashes, run_dir, train, values, write_recipe

SHORT = ("train.max_steps=6", "train.batch_size=2", "data.max_length=96")


def poison(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int]) -> None:
    """Make the loss of some forward passes NaN (one micro-batch a step)."""
    real, calls = forward.forward_backward, iter(range(10_000))

    def forward_backward(*arguments):  # type: ignore[no-untyped-def]
        loss = real(*arguments)
        return loss * float("nan") if next(calls) in bad_steps else loss

    monkeypatch.setattr(loop, "forward_backward", forward_backward)
    without_dry_run(monkeypatch)


def without_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what belongs to a step is counted: nothing is tried before step 1."""
    monkeypatch.setattr(loop.Training, "dry_run", lambda self, state: None)


def test_a_step_that_is_not_finite_is_skipped_and_its_rows_named(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, llama)
    poison(monkeypatch, {2})
    micro = (*SHORT, "train.micro_batch_size=2")
    recorder = train(recipe, *micro, "checkpoint.every_steps=1", "checkpoint.keep=9", "eval.every_steps=100")
    assert values(recorder, "step", "step") == [1, 2, 4, 5, 6]
    (said,) = recorder.of("recovered")
    assert said.as_dict()["step"] == 3 and "rows.jsonl:" in said.as_dict()["message"]
    assert hashes(recipe, 2) == hashes(recipe, 3)


def test_three_in_a_row_end_the_run(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, llama)
    poison(monkeypatch, {1, 2, 3})
    with pytest.raises(TrainingStopped, match="3 times in a row"):
        train(recipe, *SHORT, "train.micro_batch_size=2")


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, llama)
    real = loop.AdapterOptimizer.gradient_norm
    calls = iter(range(100))

    def gradient_norm(self):  # type: ignore[no-untyped-def]
        first = next(iter(self.gradients.values()))
        if not first.is_meta and next(calls) == 1:  # the estimate takes its steps on meta tensors
            first.view(-1)[0] = float("inf")
        return real(self)

    monkeypatch.setattr(loop.AdapterOptimizer, "gradient_norm", gradient_norm)
    without_dry_run(monkeypatch)
    train(recipe, *SHORT, "checkpoint.every_steps=1", "checkpoint.keep=9")
    assert hashes(recipe, 1) == hashes(recipe, 2)
    last = load_file(run_dir(recipe) / "checkpoints" / "step-000006" / "adapter.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in last.values())


def test_the_best_adapter_is_delivered_and_early_stopping_waits_for_it(tmp_path: Path, llama: Path) -> None:
    """A rate that is far too high: the evaluation loss soon rises, the run stops, the early adapter is what remains."""
    recipe = write_recipe(tmp_path, llama)
    recorder = train(
        recipe,
        *("train.max_steps=30", "train.batch_size=2", "data.max_length=96", "train.learning_rate=0.1"),
        *("train.max_grad_norm=0", "train.lr_scheduler=constant", "train.warmup_ratio=0"),
        *("eval.every_steps=1", "eval.early_stopping_patience=2", "eval.samples=0", "checkpoint.every_steps=1"),
        "checkpoint.keep=50",
    )
    (end,) = recorder.of("end")
    assert end.as_dict()["reason"] == "early stopping"
    losses = dict(zip(values(recorder, "eval", "step"), values(recorder, "eval", "loss"), strict=True))
    del losses[0]  # the untuned base
    best = min(losses, key=lambda step: losses[step])
    assert end.as_dict()["adapter_step"] == best and max(losses) == best + 2
    delivered = load_file(run_dir(recipe) / "adapter" / "adapter_model.safetensors")
    saved = load_file(run_dir(recipe) / "checkpoints" / f"step-{best:06d}" / "adapter.safetensors")
    for name, tensor in delivered.items():
        assert torch.equal(tensor, saved[name.replace(".weight", ".default.weight")])


def test_without_evaluation_rows_the_last_adapter_is_delivered(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, *SHORT, "data.eval_fraction=0")
    assert not recorder.of("eval") and values(recorder, "end", "adapter_step") == [6]
    assert (run_dir(recipe) / "adapter" / "adapter_model.safetensors").is_file()


def test_a_time_limit_ends_the_run_whole(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, "train.max_steps=1000", "train.max_minutes=0.0001", "train.batch_size=2")
    assert values(recorder, "end", "reason") == ["time limit"] and values(recorder, "end", "step") == [1]
    assert (run_dir(recipe) / "adapter" / "adapter_model.safetensors").is_file()


def test_the_run_folder_tells_the_whole_story(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, *SHORT, "eval.samples=2", "export.formats=['hf']")
    folder = run_dir(recipe)
    assert {"recipe.toml", "events.jsonl", "adapter", "checkpoints", "export"} <= {p.name for p in folder.iterdir()}
    again = load_recipe(folder / "recipe.toml")
    assert again.train.max_steps == 6 and again.data.train[0].path == str(tmp_path / "rows.jsonl")
    kinds = [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert kinds[0] == "start" and kinds.count("step") == 6 and kinds.count("end") == 1
    assert "step" not in kinds[kinds.index("end") :] and kinds[-1] == "exported"  # exports follow the training's end
    assert "plan" in kinds and kinds.index("plan") < kinds.index("step")
    assert "progress" not in kinds
    card = (folder / "adapter" / "README.md").read_text()
    assert f"| base | {llama.name} |" in card and "evaluation loss" in card and "max_steps = 6" in card
    assert {"tokenizer.json", "tokenizer_config.json", "adapter_config.json"} <= {
        path.name for path in (folder / "adapter").iterdir()
    }
    assert recorder.of("sample") and (folder / "export" / "hf" / "model.safetensors").is_file()


def test_the_next_steps_batches_are_made_meanwhile_and_change_nothing(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread from the second step on, which ends with the run; bit for bit as without it."""
    makers: list[str] = []
    real = loop.in_one_block

    def in_one_block(*arguments):  # type: ignore[no-untyped-def]
        makers.append(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr(loop, "in_one_block", in_one_block)
    settings = (*SHORT, "train.micro_batch_size=1", "train.max_steps=3", "checkpoint.every_steps=1")
    ahead, at_once = (write_recipe(tmp_path / name, llama) for name in ("ahead", "at_once"))
    stopped = train(ahead, *settings, stop_after=2)
    here = threading.current_thread().name
    assert [name == here for name in makers[:4]] == [True, True, False, False], "two micro-batches a step"
    assert values(stopped, "step", "step") == [1, 2]
    assert not [one for one in threading.enumerate() if one.name.startswith("qlora-ahead")]
    train(ahead, *settings, mode="resume")
    monkeypatch.setattr(loop.Ahead, "prepare", lambda self, key: None)
    train(at_once, *settings)
    assert hashes(ahead, 3) == hashes(at_once, 3)


def test_attention_by_documents_is_told_and_trains_the_same(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where both round alike: in bf16 losses are 8e-4 apart at the first step, and more at each next."""
    attach = adapters.attach

    def in_float32(model: Any, lora: Any, seed: int, _: torch.dtype, *about: Any) -> Any:
        return attach(model.float(), lora, seed, torch.float32, *about)

    monkeypatch.setattr(adapters, "attach", in_float32)
    settings = (*SHORT, "train.max_steps=3", 'quantization.type="none"')
    masked, by_documents = (write_recipe(tmp_path / name, llama) for name in ("masked", "documents"))
    one, other = train(masked, *settings, 'model.attention="sdpa"'), train(by_documents, *settings)
    assert (values(one, "plan", "attention"), values(other, "plan", "attention")) == (["sdpa"], ["one by one"])
    assert values(one, "start", "numerics")[0]["functions"] == lora_functions.NORMED
    assert values(other, "step", "loss") == pytest.approx(values(one, "step", "loss"), abs=2e-5)
