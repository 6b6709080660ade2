"""Delivers what each objective has learned, by the commands that a person uses: exports with their fidelity, an answer,
and the loss on the rows that it was trained with.

    python tools/preference_deliveries.py [--objectives dpo ipo orpo simpo kto] [--steps 4] [--pairs 8]

Each command must leave with 0, the exports be as near to the trained model as those of any adapter, and the exported
model be the one that was trained. Leaves with 1 where one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from make_preference_rows import marked, pairs

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("dpo", "ipo", "orpo", "simpo", "kto")
MOST_KL = 0.02  # nats a token; of other adapters of this base hf has 1e-4 and q8_0 3e-4
SAME = "the model that is exported is the one that was trained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=8, help="pairs to train on, and as many to evaluate")
    asked = parser.parse_args()
    failed = 0
    for name in asked.objectives:
        with tempfile.TemporaryDirectory(prefix="preference-deliveries-") as place:
            said = delivered(Path(place), name, asked.steps, asked.pairs)
        print(f"{name}: {said or 'trained, exported, asked and evaluated'}", flush=True)
        failed += bool(said)
    sys.exit(failed > 0)


def delivered(folder: Path, objective: str, steps: int, count: int) -> str:
    """What went wrong; "" for nothing."""
    for side, some in zip(("train", "eval"), pairs(), strict=True):
        written = marked(some[:count]) if objective == "kto" else some[:count]
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    sides = "".join(f'[[data.{side}]]\npath = "{side}.jsonl"\n' for side in ("train", "eval"))
    (folder / "pairs.toml").write_text(
        f'[model]\nbase = "{ROOT / "recipes" / "quickstart" / "base"}"\n{sides}[data]\nmax_length = 400\n'
        f'[train]\nobjective = "{objective}"\nmax_steps = {steps}\nlearning_rate = 1e-3\n[eval]\nsamples = 1\n'
    )
    run = "runs/pairs"
    commands = (
        ("train", "pairs.toml"),
        ("export", run, "--to", "hf", "--to", "gguf", "--quant", "q8_0"),
        ("chat", run, "-p", "What is the price of the Torirsten heater?", "--max-tokens", "8"),
        ("evaluate", run, "eval.jsonl", "--answers", "2"),
    )
    told = {}
    for command, *options in commands:
        done = subprocess.run(
            [sys.executable, "-m", f"qlora.cli.{command}", *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        told[command] = done.stdout
        if done.returncode:
            return f"{command} left with {done.returncode}: {done.stdout[-500:]}"
    if SAME not in re.sub(r"\s+", " ", told["export"]):
        return "the export does not say that it is of the model that was trained"
    report = json.loads((folder / run / "export" / "gguf-q8_0" / "export.json").read_text())
    far = {line["name"]: line["kl"] for line in report["fidelity"] if line["name"] in ("hf", "gguf-q8_0")}
    return "" if len(far) == 2 and max(far.values()) <= MOST_KL else f"far from the trained model: {far}"


if __name__ == "__main__":
    main()
