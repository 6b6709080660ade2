"""What a run's numbers depend on: in `start` and in its state, and compared where it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora import device, disk, run_folder, run_numerics
from qlora.events import Recorder
from qlora.model import cpu_attention
from qlora.model.resolve import resolve
from qlora.numerics import Numerics
from qlora.recipe.reading import load_recipe
from qlora.step.loss import chunk_tokens
from qlora.step.tiled_mlp import TILE_ROWS
from qlora.training import checkpoint
from tests.runs import run_dir, train, values, write_recipe

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
SHORT = ("train.max_steps=2", "train.batch_size=2", "eval.samples=0", "data.eval_fraction=0", "data.max_length=96")


def decided(folder: Path, base: Path, where: torch.device, recorded: Numerics | None, *overrides: str) -> Numerics:
    recipe = load_recipe(write_recipe(folder, base), overrides)
    return run_numerics.decide(recipe, resolve(str(base), "main", Recorder()), where, recorded)


def test_a_cpu_is_known_by_its_instructions_and_threads(tmp_path: Path, llama: Path) -> None:
    found = decided(tmp_path, llama, CPU, None)
    assert found.device == "cpu" and found.threads == torch.get_num_threads()
    assert found.capability == torch.backends.cpu.get_cpu_capability()
    assert found.attention == "qlora_one_by_one" and found.deterministic is True
    assert decided(tmp_path, llama, CPU, None, "model.attention=eager").attention == "eager"


def test_a_card_is_known_by_its_name(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "name_of", lambda _: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(device, "capability", lambda _: (8, 9))
    found = decided(tmp_path, llama, CARD, None, "train.deterministic=false")
    assert (found.device, found.capability, found.threads) == ("NVIDIA GeForce RTX 4090", "8.9", None)
    assert found.deterministic is False and found.fp32_tokens is None


def test_what_can_be_chosen_is_what_the_run_had(tmp_path: Path, llama: Path) -> None:
    new = decided(tmp_path, llama, CPU, None)
    assert new.head_chunk == new.loss_chunk == chunk_tokens(384)
    before = new.model_copy(
        update={"head_chunk": 48, "loss_chunk": 96, "deterministic": False}
    )  # which an operation without an exact form made of it
    again = decided(tmp_path, llama, CPU, before)
    assert (again.head_chunk, again.loss_chunk, again.deterministic) == (48, 96, False)
    older = decided(tmp_path, llama, CPU, before.model_copy(update={"loss_chunk": None}))
    assert older.loss_chunk == 0  # of a version that asked the head once more
    assert new.head_block is None, "which follows from where its head is"
    in_blocks = new.model_copy(update={"head_block": 64})
    assert (again.head_block, decided(tmp_path, llama, CPU, in_blocks).head_block) == (0, 64)
    assert new.experts is None  # a model without any
    assert new.mlp_tile == TILE_ROWS and decided(tmp_path, llama, CPU, new).mlp_tile == TILE_ROWS
    assert new.fp32_tokens == cpu_attention.SHORT and decided(tmp_path, llama, CPU, new).fp32_tokens == new.fp32_tokens
    older = new.model_copy(update={"mlp_tile": None, "fp32_tokens": None})  # of a version that knew no tiles
    again = decided(tmp_path, llama, CPU, older)
    assert (again.mlp_tile, again.fp32_tokens) == (None, None)


def test_one_notice_names_every_difference(tmp_path: Path) -> None:
    now = Numerics(device="cpu", threads=2)
    versions = {**run_folder.versions(), "torch": "2.1.0"}
    disk.publish_folder(tmp_path / "step", lambda folder: None, {"versions": versions})
    recorder = Recorder()
    run_numerics.say_what_differs(tmp_path / "step", now.model_copy(update={"threads": 8}), now, recorder)
    (notice,) = (event.as_dict() for event in recorder.events)
    assert "not bit for bit" in notice["message"] and "threads 8 (now 2), torch 2.1.0 (now" in notice["message"]
    assert notice["count"] == 2
    recorder = Recorder()
    run_numerics.say_what_differs(tmp_path / "step", None, now, recorder)  # an older version recorded its packages
    assert values(recorder, "notice", "count") == [1]
    disk.publish_folder(tmp_path / "same", lambda folder: None, {"versions": run_folder.versions()})
    run_numerics.say_what_differs(tmp_path / "same", now, now, recorder)
    assert len(recorder.events) == 1


def test_a_run_keeps_them_and_goes_on_with_them(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, llama)
    began = train(recipe, *SHORT, "train.deterministic=false", stop_after=1)
    saved = checkpoint.newest(run_dir(recipe), Recorder())
    assert saved is not None and saved.state.numerics is not None
    assert values(began, "start", "numerics") == [saved.state.numerics.model_dump(exclude_none=True)]
    assert "changes nothing" in values(began, "plan", "resume")[0]
    machine = run_numerics._machine(CPU)
    monkeypatch.setattr(run_numerics, "_machine", lambda _: {**machine, "threads": 99})
    again = train(recipe, *SHORT, "train.deterministic=false", mode="resume")
    (said,) = [notice for notice in values(again, "notice", "message") if "bit for bit" in notice]
    assert said.endswith(f"threads {torch.get_num_threads()} (now 99)")
    ended = checkpoint.newest(run_dir(recipe), Recorder())
    now = {"threads": 99, "head_block": 0}  # a run that goes on knows that its head was whole
    assert ended is not None and ended.state.numerics == saved.state.numerics.model_copy(update=now)
