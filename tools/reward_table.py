"""GRPO over the quickstart base, several seeds, and its control: exact match on held-out questions, before and after.

    python tools/reward_table.py [--seeds 1 2 3] [--steps 50] [--out FOLDER]

Rows are those of make_reward_rows.py. A few supervised steps teach the manners of an answer and nothing of which is
right; GRPO goes on from there by exact match alone. The control is the same run, judged by shuffled_reward.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from make_reward_rows import rows, write

from qlora import api
from qlora.recipe.reading import load_recipe

ROOT = Path(__file__).resolve().parent.parent
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="folder for rows and runs; a temporary one without")
    asked = parser.parse_args()
    folder = asked.out or Path(tempfile.mkdtemp(prefix="qlora-rewards-"))
    write(folder, *rows())
    warmup = api.train(load_recipe(recipe_of(folder, "warmup", WARMUP)), name="warmup", mode="fresh")
    print(f"after the warm-up: {warmup.state.exact_match_after:.1%}", flush=True)
    grpo, judges = recipe_of(folder, "grpo", GRPO), {"exact match": "", "shuffled": "tools/shuffled_reward.py:score"}
    for name, function in judges.items():
        for seed in asked.seeds:
            keys = [f"train.seed={seed}", f"train.max_steps={asked.steps}"]
            keys += [] if function else ['train.rewards=["exact_match"]']
            functions = [str(ROOT / function)] if function else []
            recipe = load_recipe(grpo, keys)
            state = api.train(recipe, name=f"{name.split()[0]}-{seed}", mode="fresh", rewards=functions).state
            print(f"{name}, seed {seed}: {state.exact_match_before:.1%} -> {state.exact_match_after:.1%}", flush=True)


if __name__ == "__main__":
    main()
