"""What tests of runs share: an optimizer after a step, what a manifest says of the run, and a recipe with documents."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora.step.optimizer import AdapterOptimizer

ABOUT = {"versions": {"qlora": "1.2.3", "torch": "2.10.0"}, "recipe_sha256": "ab" * 32}

MANUAL = """# Lamps

The Orla lamp runs for nine hours. The Bexley lamp costs 12 euros. The Tavery lamp comes in green.

# Pumps

The Marlow pump has a warranty of seven years. Code E41 means that water is missing. The Zephra pump weighs 3 kg.
"""
DOCUMENT_KEYS = (
    "train.batch_size=2",
    "train.epochs=2",
    "data.max_length=256",
    "exam.questions=2",
    "checkpoint.every_steps=2",
)


def optimizer() -> AdapterOptimizer:
    """After one step over four small matrices; the same values each time."""
    torch.manual_seed(0)
    parameters = {
        f"base_model.model.l{i}.lora_{m}.default.weight": torch.nn.Parameter(torch.randn(4, 8).bfloat16())
        for i in (0, 1)
        for m in "AB"
    }
    made = AdapterOptimizer(parameters, "adamw", 0.0)
    for key, master in made.masters.items():
        made.add_gradient(key, torch.randn_like(master))
    made.gradient_norm()
    made.step(1e-3)
    return made


def write_manuals(folder: Path, base: Path, more: str = "") -> Path:
    """A recipe that learns a folder of one manual."""
    (folder / "manuals").mkdir(parents=True)
    (folder / "manuals" / "manual.md").write_text(MANUAL)
    path = folder / "learn.toml"
    text = (
        f'[model]\nbase = "{base}"\n[[data.documents]]\npath = "manuals"\n{more}[output]\ndir = "{folder / "runs"}"\n'
    )
    path.write_text(text)
    return path
