"""How each objective tells answers apart that it has never seen, over the quickstart's base: a table of some seeds.

    python tools/preference_table.py [--objectives dpo ipo …] [--seeds 3] [--steps 200] [--out table.json]

Rows are those of `make_preference_rows.py`; what is compared are always the same 90 held-out pairs, by kto too, which
learns from marked answers. `swapped` is dpo whose training rows call the worse answer the better one: the control.

Settings are the same for all but for what their losses ask for on rows like these, where a base has never said anything
in either manner, and values are drawn at random, so that no answer can be known as a whole:

- orpo: at a strength of 0.1, for instruction data (2403.07691, section 6.1), the part that imitates outweighs the part
  that compares: its gradient is mostly of values. At 1.0, the strongest that the paper tries, it learns as dpo does.
- kto: its loss is flat far from the reference, on both sides (2402.01306, section 4), and marked answers, unlike pairs,
  do not cancel what both say: at the rate of the others all answers leave the slope within a few steps (72 % after
  200, at a beta of 0.5 none learned at all). Half of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "recipes" / "quickstart" / "base"
OBJECTIVES = ("dpo", "ipo", "orpo", "simpo", "kto", "swapped")
KEYS = (
    *("data.max_length=400", "train.batch_size=1", "train.learning_rate=2e-3", "train.gradient_checkpointing=false"),
    *("eval.samples=0", "report.sinks=[]"),
)
OWN: dict[str, tuple[str, ...]] = {"orpo": ("train.beta=1.0",), "kto": ("train.learning_rate=1e-3",)}
SHOWN = ("accuracy", "likelier", "margin", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another key of the recipe")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    asked = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in asked.objectives:
        for seed in range(1, asked.seeds + 1):
            with tempfile.TemporaryDirectory(prefix="preference-table-") as place:
                keys = (*OWN.get(name, ()), f"train.seed={seed}", *asked.set)
                before, after = trained(Path(place), name, asked.steps, keys)
            found.setdefault(name, []).append({"seed": seed, "before": before, "after": after})
            print(f"{name}, seed {seed}: {_told(before)} -> {_told(after)}", file=sys.stderr, flush=True)
    show(found, asked.steps)
    if asked.out is not None:
        asked.out.write_text(json.dumps({"steps": asked.steps, "found": found}, indent=1) + "\n")


def trained(folder: Path, name: str, steps: int, keys: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of held-out pairs before and after a run of so many steps, which stays in `folder`."""
    from qlora import api
    from qlora.events import Recorder
    from qlora.recipe.reading import load_recipe

    objective = "dpo" if name == "swapped" else name
    train = rows(folder / "train", *(("--marked",) if name == "kto" else ("--swapped",) if name == "swapped" else ()))
    recipe = folder / "pairs.toml"
    recipe.write_text(
        f'[model]\nbase = "{BASE}"\n[train]\nobjective = "{objective}"\n[output]\ndir = "{folder / "runs"}"\n'
        f'[[data.train]]\npath = "{train / "train.jsonl"}"\n'
        f'[[data.eval]]\npath = "{rows(folder / "eval") / "eval.jsonl"}"\nformat = "preference"\n'
    )
    recorder, length = Recorder(), (f"train.max_steps={steps}", f"eval.every_steps={steps}")
    api.train(load_recipe(recipe, (*KEYS, *length, *keys)), name="pairs", sink=recorder)
    told = [event.as_dict() for event in recorder.of("preference") if event.as_dict()["evaluated"]]
    return told[0], told[-1]


def rows(folder: Path, *options: str) -> Path:
    """A folder with the rows of `make_preference_rows.py`."""
    command = [sys.executable, "tools/make_preference_rows.py", "--out", str(folder), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def _told(figures: dict[str, Any]) -> str:
    return f"{100 * figures['accuracy']:.1f} %, margin {figures['margin']:.2f}, KL {figures['kl']:.2f}"


def show(found: dict[str, list[dict[str, Any]]], steps: int) -> None:
    """A line an objective: of each figure behind the run the median over seeds, of the accuracy the least as well."""
    print(f"{'held-out pairs':10} {'before, %':>10} {f'after {steps}, %':>14} {'least':>7} {'likelier':>9}", end="")
    print(f" {'margin':>8} {'KL, nats':>9}  runs")
    for name, runs in found.items():
        after = {key: statistics.median(run["after"][key] for run in runs) for key in SHOWN}
        before = statistics.median(run["before"]["accuracy"] for run in runs)
        extreme = (max if name == "swapped" else min)(run["after"]["accuracy"] for run in runs)
        print(f"{name:14} {100 * before:>10.1f} {100 * after['accuracy']:>14.1f} {100 * extreme:>7.1f}", end="")
        print(f" {100 * after['likelier']:>9.1f} {after['margin']:>8.2f} {after['kl']:>9.2f}  {len(runs)}")


if __name__ == "__main__":
    main()
