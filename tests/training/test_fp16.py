"""A run in fp16: the loss is scaled, a step over the range is done again, a resumed run is the same bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qlora
from qlora import api
from qlora.events import Recorder
from qlora.loss_scale import LARGEST
from qlora.recipe.reading import load_recipe
from qlora.step import forward
from qlora.training import loop
from tests.card import MIB, Card, rehearsal
from tests.runs import EVERYTHING, hashes, run_dir, train, values, write_recipe

FP16 = (*EVERYTHING, "lora.dropout=0", "model.dtype=fp16", "train.max_steps=8", "checkpoint.every_steps=1")
OVERFLOWS_AT, TIMES = 3, 2**14
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"


def too_large(monkeypatch: pytest.MonkeyPatch, step: int = OVERFLOWS_AT) -> None:
    """The loss of one step is TIMES as large, so that its gradients in fp16 are infinite."""
    now = [0]
    seed, real = forward.seed_micro_batch, forward.forward_backward

    def seed_micro_batch(*place: int) -> None:
        now[0] = place[1] + 1
        seed(*place)

    def forward_backward(parts: Any, batch: Any, objective: Any, step_weight: float, alpha: float) -> torch.Tensor:
        return real(parts, batch, objective, step_weight / (TIMES if now[0] == step else 1), alpha)

    monkeypatch.setattr(loop, "seed_micro_batch", seed_micro_batch)
    monkeypatch.setattr(loop, "forward_backward", forward_backward)
    monkeypatch.setattr(loop.Training, "dry_run", lambda self, state: None)  # only steps are counted


def scale_at(recipe: Path, step: int) -> dict[str, int]:
    file = run_dir(recipe) / "checkpoints" / f"step-{step:06d}" / "state.json"
    return json.loads(file.read_text())["state"]["loss_scale"]  # type: ignore[no-any-return]


def test_a_step_over_the_range_is_done_again_and_resumed_bit_for_bit(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_large(monkeypatch)
    one, two = (write_recipe(tmp_path / name, llama) for name in ("one", "two"))
    recorder = train(one, *FP16, "checkpoint.keep=20")
    assert values(recorder, "start", "numerics")[0]["dtype"] == "fp16"
    assert values(recorder, "step", "step") == list(range(1, 9))  # none was skipped
    again = values(recorder, "recovered", "message")
    assert again and {event.as_dict()["step"] for event in recorder.of("recovered")} == {OVERFLOWS_AT}
    assert all("done again" in message for message in again)
    smaller = LARGEST >> len(again)
    assert str(smaller) in again[-1]
    assert [scale_at(one, step) for step in (2, 3, 8)] == [
        {"factor": LARGEST, "good_steps": 2},
        {"factor": smaller, "good_steps": 1},
        {"factor": smaller, "good_steps": 6},
    ]
    for stop in (OVERFLOWS_AT - 1, 5):  # before it, and with the smaller scale
        train(two, *FP16, mode="fresh" if run_dir(two).exists() else "new", stop_after=stop)
        train(two, *FP16, mode="resume")
        assert hashes(two, 8) == hashes(one, 8) and scale_at(two, 8) == scale_at(one, 8)
    tensors = load_file(run_dir(one) / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_a_loss_that_is_not_finite_is_skipped_and_not_scaled_less(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = forward.forward_backward, iter(range(100))

    def forward_backward(*arguments: Any) -> torch.Tensor:
        loss = real(*arguments)
        return loss * float("nan") if next(calls) == 1 else loss

    monkeypatch.setattr(loop, "forward_backward", forward_backward)
    monkeypatch.setattr(loop.Training, "dry_run", lambda self, state: None)  # only steps are counted
    recipe = write_recipe(tmp_path, llama)
    settings = ("train.batch_size=2", "train.micro_batch_size=2", "data.max_length=96", "train.max_steps=3")
    recorder = train(recipe, *settings, "model.dtype=fp16")
    assert values(recorder, "step", "step") == [1, 3] and "step skipped" in values(recorder, "recovered", "message")[0]
    assert scale_at(recipe, 3) == {"factor": LARGEST, "good_steps": 2}


def test_bf16_has_no_scale(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, "train.max_steps=1", "train.batch_size=2", "data.max_length=96")
    assert values(recorder, "start", "numerics")[0]["dtype"] == "bf16" and scale_at(recipe, 1) is None


def test_a_card_without_bf16_trains_in_fp16(tmp_path: Path, llama: Path) -> None:
    """The whole way on a stand-in for a T4: the recipe says nothing of it."""
    recipe = write_recipe(tmp_path, llama)
    settings = ("train.max_steps=2", "train.batch_size=2", "data.max_length=96", "train.deterministic=false")
    with pytest.MonkeyPatch.context() as patch, rehearsal(patch, Card(512 * MIB, "Tesla T4", (7, 5))):
        recorder = train(recipe, *settings)
    numbers = values(recorder, "start", "numerics")[0]
    assert numbers["dtype"] == "fp16" and numbers["capability"] == "7.5"
    assert values(recorder, "end", "reason") == ["finished"] and scale_at(recipe, 2)["good_steps"] == 2


def test_what_was_trained_in_fp16_is_exported_opened_and_measured(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    settings = ("train.max_steps=6", "train.batch_size=4", "train.learning_rate=1e-3", "data.max_length=96")
    recorder = train(recipe, *settings, "model.dtype=fp16", "export.formats=['hf', 'adapter-gguf']")
    note = json.loads((run_dir(recipe) / "adapter" / "qlora.json").read_text())
    assert note["dtype"] == "fp16"
    exported = recorder.of("exported")
    assert len(exported) == 2
    (fidelity,) = [event.as_dict() for event in recorder.of("fidelity")]
    kls = {entry["name"]: entry["kl"] for entry in fidelity["entries"]}
    assert kls["hf"] < 1e-3, kls
    # The trained model that exports are compared with computes as the run did.
    assert math.isclose(fidelity["evaluation"]["here"], fidelity["evaluation"]["delivered"], rel_tol=1e-4)
    with qlora.open_chat(run_dir(recipe), sampling=qlora.Sampling(temperature=0, max_tokens=4)) as chat:
        assert isinstance(chat.ask("What is the price of lamp 1?").text, str)


@pytest.mark.every
def test_the_quickstart_learns_as_much_as_in_bf16(tmp_path: Path) -> None:
    losses = {}
    for dtype in ("bf16", "fp16"):
        recorder = Recorder()
        asked = [f"output.dir={tmp_path}", f"model.dtype={dtype}", "export.formats=[]", "eval.exact_match_rows=0"]
        short = ["train.max_steps=60", "eval.samples=0", "data.eval_fraction=0.05"]
        api.train(load_recipe(QUICKSTART, [*asked, *short]), name=dtype, sink=recorder)
        losses[dtype] = recorder.of("end")[0].as_dict()["eval_loss"]
    assert math.isclose(losses["fp16"], losses["bf16"], rel_tol=0.01)
