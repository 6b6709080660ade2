"""`--verify-resume` proves the promise on the user's own machine, and would say if it were broken."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.cli import verify_resume
from qlora.errors import TrainingStopped
from qlora.events import Recorder
from qlora.model.identity import Fingerprints
from qlora.numerics import Numerics
from qlora.recipe.reading import Recipe, load_recipe, recipe_toml
from qlora.training import checkpoint
from tests.cli.cases import run, run_in_a_fork
from tests.runs import EVERYTHING, write_recipe
from tests.training.cases import ABOUT, optimizer


def test_the_short_recipe_keeps_all_that_decides_a_step(tmp_path: Path, llama: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, llama), [*EVERYTHING, "train.epochs=3"])
    short = verify_resume.short(recipe, tmp_path)
    file = tmp_path / "short.toml"
    file.write_text(recipe_toml(short))
    again = load_recipe(file)
    for section in ("model", "quantization", "lora", "data"):
        assert getattr(again, section) == getattr(recipe, section)
    kept = {"batch_size", "micro_batch_size", "learning_rate", "optimizer", "neftune_alpha", "seed", "warmup_ratio"}
    assert all(getattr(again.train, key) == getattr(recipe.train, key) for key in kept)
    assert again.train.max_steps == verify_resume.STEPS and again.export.formats == ()


def test_a_difference_in_one_bit_is_said(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}
    for side in ("one", "two"):
        (tmp_path / side).mkdir()
        for name in ("adapter.safetensors", "optimizer.safetensors"):
            save_file(tensors, tmp_path / side / name)
    assert verify_resume._compare(tmp_path / "one", tmp_path / "two") == verify_resume.Proof(4, 6, 3)
    changed = load_file(tmp_path / "two" / "optimizer.safetensors")
    changed["a"] = changed["a"].clone()
    changed["a"].view(torch.int32)[1, 1] ^= 1
    save_file(changed, tmp_path / "two" / "optimizer.safetensors")
    with pytest.raises(TrainingStopped, match="1 of 4 tensors differ, a first"):
        verify_resume._compare(tmp_path / "one", tmp_path / "two")
    shutil.copy(tmp_path / "one" / "optimizer.safetensors", tmp_path / "two")
    del changed["a"]
    save_file(changed, tmp_path / "two" / "adapter.safetensors")
    with pytest.raises(TrainingStopped, match="1 of 4 tensors differ, a first, by at most inf"):
        verify_resume._compare(tmp_path / "one", tmp_path / "two")


def test_what_is_exact_to_rounding_is_compared_within_a_tolerance_that_is_named(tmp_path: Path) -> None:
    began = {"master/a": torch.zeros(100), "state1/a": torch.zeros(100, dtype=torch.uint8)}
    ended = {"master/a": torch.full((100,), 1e-3), "state1/a": torch.ones(100, dtype=torch.uint8)}
    for side in ("half", "one", "two"):
        (tmp_path / side).mkdir()
    folders = tmp_path / "half", tmp_path / "one", tmp_path / "two"
    save_file(began, folders[0] / "optimizer.safetensors")
    save_file(ended, folders[1] / "optimizer.safetensors")
    save_file({**ended, "master/a": ended["master/a"] * 1.04}, folders[2] / "optimizer.safetensors")
    proof = verify_resume._compare_to_rounding(*folders)
    assert proof.apart == pytest.approx(0.04, rel=1e-3)
    assert "right to rounding" in str(proof) and "4.00% of what they moved since, 5% are allowed" in str(proof)
    save_file({**ended, "master/a": ended["master/a"] * 1.06}, folders[2] / "optimizer.safetensors")
    with pytest.raises(TrainingStopped, match=r"differ by 6\.00% .*5% are allowed"):
        verify_resume._compare_to_rounding(*folders)
    save_file(began, folders[1] / "optimizer.safetensors")  # nothing moved, and the ends differ
    with pytest.raises(TrainingStopped, match="differ by inf%"):
        verify_resume._compare_to_rounding(*folders)


@pytest.mark.parametrize("asked", [True, False, None])
def test_what_the_run_recorded_decides_what_is_compared(
    asked: bool | None, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation without an exact form makes a run exact to rounding as well, whatever its recipe says."""
    made, of_base = optimizer(), Fingerprints("base", "data")

    def trained(recipe: Recipe, out: Path, name: str, *flags: str) -> None:
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "recipe.toml").touch()
        numbers = None if asked is None else Numerics(deterministic=asked)
        for step in (verify_resume.HALF, verify_resume.STEPS):
            if not checkpoint.folder_of(out / name, step).exists():
                state = checkpoint.RunState(step=step, numerics=numbers)
                checkpoint.snapshot(out / name, state, made, of_base, 2, ABOUT)()

    monkeypatch.setattr(verify_resume, "_train", trained)
    recipe = load_recipe(write_recipe(tmp_path, llama))
    proof = verify_resume.verify_resume(recipe, "tiny", Recorder())
    assert proof.apart == (0.0 if asked is False else None)
    assert f"{proof}".startswith("resume is right to rounding" if asked is False else "resume is exact: ")


@pytest.mark.slow
def test_the_command(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    settings = [word for item in EVERYTHING for word in ("--set", item)]
    code, out, error, _ = run(str(recipe), "--verify-resume", *settings, cwd=tmp_path)
    assert code == 0, error
    assert re.search(r"resume is exact: \d+ tensors of adapter and optimizer are equal bit for bit after step\s+6", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "tiny.toml"]  # and nothing is left


@pytest.mark.slow
def test_an_error_of_the_run_is_the_commands_own(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    arguments = (str(recipe), "--verify-resume", "--set", "lora.target_modules=['nope']")
    code, _, error, _ = run_in_a_fork(*arguments, cwd=tmp_path)
    assert code == 2 and "no linear layer 'nope'" in error and "Traceback" not in error
