"""Whole commands under a pseudo-terminal: what strangers wrote is seen, and steers nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.attacks.terminals import HOSTILE, command, foreign_controls, under_terminal

SEEN = "\u241b]0;owned\u2407".encode()  # how the payload's beginning is shown
TRAIN = (
    *("train.max_steps=2", "train.batch_size=2", "data.max_length=512", "data.eval_fraction=0.2", "eval.every_steps=1"),
    *("eval.samples=1", "lora.r=4", 'memory.limit="8GiB"'),
)


def world(folder: Path, llama: Path, name: str = "[bold]run[-bold]") -> Path:
    """A recipe in a folder with a hostile name; base, rows, columns and configuration keys have hostile texts too."""
    place = folder / HOSTILE
    shutil.copytree(llama, base := place / "base" / HOSTILE)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, f"key {HOSTILE}": 1, "quality": HOSTILE}))
    turns = [("user", f"What {HOSTILE}?"), ("assistant", f"It {HOSTILE}.")]
    good = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows = [good] * 12 + [{"messages": HOSTILE}, {f"column {HOSTILE}": 1}]
    file = place / f"rows{HOSTILE}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({**row}) + "\n" for row in rows))
    recipe = place / f"{name}.toml"
    paths = [json.dumps(str(path)) for path in (base, file, place / "runs")]
    recipe.write_text(
        f"[model]\nbase = {paths[0]}\n[data]\nmax_bad_rows = 5\n[[data.train]]\npath = {paths[1]}\n"
        f"[output]\ndir = {paths[2]}\n"
    )
    return recipe


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_train_export_and_estimate(tmp_path: Path, llama: Path) -> None:
    recipe = world(tmp_path, llama)
    for name, arguments in (
        ("train", [str(recipe), *words(*TRAIN)]),
        ("export", [str(recipe.parent / "runs" / recipe.stem), "--no-verify"]),
        ("estimate", [str(recipe)]),
    ):
        code, output = under_terminal(command(name, *arguments))
        print(output.decode(errors="replace"))
        assert code == 0, output.decode(errors="replace")
        assert foreign_controls(output) == []
        assert (SEEN in output.replace(b"\r\n", b"")) or name == "estimate"
