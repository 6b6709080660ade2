"""Recipes of preference over a tiny base: pairs of prices in euros and francs, and marked answers."""

from __future__ import annotations

import json
from pathlib import Path

from qlora.events import Recorder
from tests.runs import EVERYTHING

ALL = (*EVERYTHING, "train.max_steps=8", "eval.samples=1")


def write_pairs(path: Path, count: int = 30) -> None:
    rows = [
        {
            "prompt": f"What is the price of lamp {i}{' and the station' * (i % 3)}?",
            "chosen": f"It costs {i * 7 % 90 + 10} euros.",
            "rejected": f"It costs {i * 7 % 90 + 10} francs{' and more' * (i % 2)}.",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_marked(path: Path, count: int = 40) -> None:
    rows = [
        {
            "prompt": f"What is the price of lamp {i}{' and the station' * (i % 3)}?",
            "completion": f"It costs {i * 7 % 90 + 10} {'euros' if i % 2 else 'francs'}.",
            "label": bool(i % 2),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(folder: Path, base: Path, objective: str, name: str = "tiny") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (write_marked if objective == "kto" else write_pairs)(folder / "rows.jsonl")
    path = folder / f"{name}.toml"
    path.write_text(
        f'[model]\nbase = "{base}"\n[[data.train]]\npath = "rows.jsonl"\n[train]\nobjective = "{objective}"\n'
        f'[output]\ndir = "{folder / "runs"}"\n'
    )
    return path


def notices(recorder: Recorder, topic: str) -> list[str]:
    return [event.as_dict()["message"] for event in recorder.of("notice") if event.as_dict()["topic"] == topic]
