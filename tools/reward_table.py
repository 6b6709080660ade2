"""GRPO over the quickstart base, several seeds, and its control: exact match on held-out questions, before and after.

    python tools/reward_table.py [--seeds 1 2 3] [--steps 80] [--out FOLDER]

Rows are those of make_reward_rows.py. A few supervised steps teach the manners of an answer and nothing of which is
right; GRPO goes on from there by exact match alone. The control is the same run, judged by shuffled_reward.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from make_reward_rows import rows, write  # noqa: E402

from qlora import api  # noqa: E402
from qlora.recipe.reading import load_recipe  # noqa: E402

COMMON = f"""
[model]
base = "{(ROOT / "recipes" / "quickstart" / "base").as_posix()}"
[data]
max_length = 400
[[data.eval]]
path = "eval.jsonl"
COLUMNS
[eval]
every_steps = 1000
exact_match_rows = 64
samples = 0
[report]
sinks = ["jsonl"]
[output]
dir = "OUT"
[train]
gradient_checkpointing = false
optimizer = "adamw"
warmup_ratio = 0.1
lr_scheduler = "linear"
learning_rate = 2e-3
"""
WARMUP = """
batch_size = 1
max_steps = 60
[[data.train]]
path = "warmup.jsonl"
[lora]
r = 32
"""
GRPO = """
objective = "grpo"
batch_size = 12
micro_batch_size = 32
num_generations = 8
max_completion_length = 12
beta = 0.1
[[data.train]]
path = "train.jsonl"
[lora]
from = "OUT/warmup"
"""


def recipe_of(folder: Path, name: str, text: str) -> Path:
    """The recipe in the folder of its rows."""
    path = folder / f"{name}.toml"
    common = COMMON.replace("COLUMNS", "" if name == "grpo" else 'columns = { completion = "answer" }')
    path.write_text(f"{common}{text}".replace("OUT", (folder / "runs").as_posix()), encoding="utf-8")
    return path


def warmed(folder: Path) -> float:
    """Write the rows and train the warm-up; its exact match on held-out questions."""
    write(folder, *rows())
    state = api.train(load_recipe(recipe_of(folder, "warmup", WARMUP)), name="warmup", mode="fresh").state
    return float(state.exact_match_after or 0.0)


def judged(folder: Path, seed: int, steps: int, function: str = "") -> tuple[float, float]:
    """Exact match before and after GRPO from the warm-up, by exact match or by a function of a file."""
    keys = [f"train.seed={seed}", f"train.max_steps={steps}"]
    keys += [] if function else ['train.rewards=["exact_match"]']
    recipe = load_recipe(recipe_of(folder, "grpo", GRPO), keys)
    name = f"{'shuffled' if function else 'exact'}-{seed}"
    state = api.train(recipe, name=name, mode="fresh", rewards=[function] if function else []).state
    return float(state.exact_match_before or 0.0), float(state.exact_match_after or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, help="folder for rows and runs; a temporary one without")
    asked = parser.parse_args()
    folder = asked.out or Path(tempfile.mkdtemp(prefix="qlora-rewards-"))
    print(f"after the warm-up: {warmed(folder):.1%}", flush=True)
    for name, function in {"exact match": "", "shuffled": f"{ROOT}/tools/shuffled_reward.py:score"}.items():
        for seed in asked.seeds:
            before, after = judged(folder, seed, asked.steps, function)
            print(f"{name}, seed {seed}: {before:.1%} -> {after:.1%}", flush=True)


if __name__ == "__main__":
    main()
