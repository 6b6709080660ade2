"""What learning the handbook gives, by seed and by kind of labels, and what raw text gives.

    python tools/bench/manuals.py --out tools/bench/results/manuals.json

Three seeds of `recipes/manuals.toml` with soft and with hard labels; and the control: the same text as plain
documents to go on with (`format = "documents"`), asked the same questions afterwards by `qlora-exam --of`. The
questions of a seed are those of its soft run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "manuals.toml"
COLUMNS = ("base", "base_retrieval", "base_passage", "tuned", "tuned_retrieval")
RAW = """\
[model]
base = "{base}"
[quantization]
type = "nf4"
[lora]
r = 32
alpha = 64
[data]
max_length = 400
eval_fraction = 0
[[data.train]]
path = "{documents}"
format = "documents"
[train]
epochs = {epochs}
batch_size = 2
learning_rate = 2e-3
lr_scheduler = "linear"
warmup_ratio = 0.1
gradient_checkpointing = false
seed = {seed}
[export]
formats = ["hf"]
[output]
dir = "{out}"
"""


def command(recipe: Path, changes: list[str]) -> dict[str, float]:
    """One whole command; its seconds and the peak of its memory in MiB."""
    began = time.monotonic()
    sets = [part for change in changes for part in ("--set", change)]
    subprocess.run([sys.executable, "-m", "qlora.cli.train", str(recipe), *sets], check=True, cwd=ROOT)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": round(time.monotonic() - began, 1), "peak_mib_of_all_so_far": round(peak)}


def figures(study: Path) -> dict[str, Any]:
    """Shares of exam.json, and what share of the questions each filter dropped."""
    exam = json.loads((study / "exam.json").read_text(encoding="utf-8"))
    asked = sum(
        len(json.loads(line)["questions"]) for line in (study / "questions.jsonl").read_text("utf-8").splitlines()
    )
    parts = {
        part: {
            "questions": content["questions"],
            **{name: column["right"]["mean"] for name, column in content["columns"].items()},
        }
        for part, content in exam["parts"].items()
    }
    dropped = {reason: round(count / asked, 4) for reason, count in exam["dropped"].items()}
    return {"parts": parts, "asked": asked, "dropped_share": dropped, "nats": exam["elsewhere"]["nats"]}


def raw_text(out: Path, studied: Path, seed: int, epochs: int) -> dict[str, Any]:
    """The control: plain training on the documents, whose merged model is then asked what the run `studied` asks."""
    manuals = ROOT / "recipes" / "manuals"
    recipe = out / "raw.toml"
    places = {"base": manuals / "base", "documents": manuals / "documents", "out": out}
    recipe.write_text(RAW.format(**places, seed=seed, epochs=epochs), encoding="utf-8")
    spent = command(recipe, [])
    asked = [sys.executable, "-m", "qlora.cli.exam", str(studied), "--of", str(out / "raw" / "export" / "hf"), "--json"]
    done = subprocess.run(asked, check=True, cwd=ROOT, capture_output=True, text=True)
    words = json.loads(done.stdout)["parts"]["words"]
    return {**spent, **{name: column["right"]["mean"] for name, column in words["columns"].items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--raw-epochs", type=int, default=60, help="the control sees its few rows more often")
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for labels in ("soft", "hard"):
                out = Path(folder) / labels
                spent = command(RECIPE, [f"train.seed={seed}", f"study.labels={labels}", f"output.dir={out}"])
                found.append({"seed": seed, "labels": labels, **spent, **figures(out / "manuals" / "study")})
            studied = Path(folder) / "soft" / "manuals"
            found.append({"seed": seed, "labels": "raw", **raw_text(Path(folder), studied, seed, given.raw_epochs)})
        given.out.write_text(json.dumps({"runs": found, "median": medians(found)}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(medians(found), indent=1))


def medians(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over the seeds, by labels and column: of the questions in other words."""
    rows: dict[str, dict[str, list[float]]] = {}
    for run in found:
        shares = run if run["labels"] == "raw" else run["parts"]["words"]
        for column in COLUMNS:
            if column in shares:
                rows.setdefault(run["labels"], {}).setdefault(column, []).append(shares[column])
    return {labels: {name: statistics.median(given) for name, given in own.items()} for labels, own in rows.items()}


if __name__ == "__main__":
    main()
