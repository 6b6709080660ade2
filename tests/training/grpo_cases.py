"""A recipe of GRPO over a tiny base whose rewards tell its answers apart, and what a run of it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora.disk import sha256_file
from qlora.training import generations
from tests.runs import run_dir, write_rows

KEYS = (
    "train.batch_size=2",
    "train.num_generations=4",
    "train.max_completion_length=10",
    "train.micro_batch_size=4",
    "train.max_steps=6",
    "train.learning_rate=1e-3",
    "data.max_length=96",
    "data.eval_fraction=0.2",
    "eval.every_steps=3",
    "eval.samples=1",
    "eval.exact_match_rows=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
)


def write_recipe(folder: Path, base: Path, name: str = "tiny") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl")
    path = folder / f"{name}.toml"
    path.write_text(
        f'[model]\nbase = "{base}"\n[[data.train]]\npath = "rows.jsonl"\n[train]\nobjective = "grpo"\n'
        f'rewards = ["regex:[aeiou]", "exact_match"]\n[output]\ndir = "{folder / "runs"}"\n'
    )
    return path


def kept(recipe: Path) -> dict[str, str]:
    """sha256 of each file of generations."""
    folder = run_dir(recipe) / generations.FOLDER
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def lines(recipe: Path, step: int) -> list[dict[str, Any]]:
    text = (run_dir(recipe) / generations.FOLDER / f"step-{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
