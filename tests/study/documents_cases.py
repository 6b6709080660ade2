"""What tests of runs with documents share: a manual, a recipe that studies it, and settings whose runs are short."""

from __future__ import annotations

from pathlib import Path

MANUAL = """# Lamps

The Orla lamp runs for nine hours. The Bexley lamp costs 12 euros. The Tavery lamp comes in green.

# Pumps

The Marlow pump has a warranty of seven years. Code E41 means that water is missing. The Zephra pump weighs 3 kg.
"""
KEYS = ("train.batch_size=2", "train.epochs=2", "data.max_length=256", "exam.questions=2", "checkpoint.every_steps=2")


def write_recipe(folder: Path, base: Path, more: str = "") -> Path:
    (folder / "manuals").mkdir(parents=True)
    (folder / "manuals" / "manual.md").write_text(MANUAL)
    path = folder / "learn.toml"
    text = (
        f'[model]\nbase = "{base}"\n[[data.documents]]\npath = "manuals"\n{more}[output]\ndir = "{folder / "runs"}"\n'
    )
    path.write_text(text)
    return path
