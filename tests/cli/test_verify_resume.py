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
from qlora.recipe.reading import load_recipe, recipe_toml
from tests.cli.cases import run
from tests.runs import EVERYTHING, write_recipe


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
    code, _, error, _ = run(*arguments, cwd=tmp_path)
    assert code == 2 and "no linear layer 'nope'" in error and "Traceback" not in error
