"""Several processes against one: tokens a second of the same steps, in turns, and what each step sends.

    python tools/bench/processes.py [--processes 2] [--steps 12] [--runs 5] [--length 400] [--batch 8] [--base FOLDER]

Each process computes with one thread, so that two of them on two cores are compared with one on one: what is asked is
how much of a second core a second process makes use of. Rows are `--length` tokens, one a micro-batch, `--batch` a
step, all of their tokens trained. The runs take turns (one, several, one, several, …); a figure is the median over runs
of each run's median step, without its first two. `compute` is what the best possible division would give: as many
times as many micro-batches as the busiest process has fit into the step's.

Started by torchrun, as a person starts it. Nothing else may run on the machine: processes wait for each other at each
step, so that another program slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WARM_UP = 2
WORDS_OF_A_ROW = 4  # a token of English has about three letters: enough words for the longest row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--base", type=Path, default=ROOT / "recipes" / "quickstart" / "base")
    asked = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], asked.processes: []}
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(Path(folder), asked)
        for number in range(asked.runs):
            for count in speeds:
                events = _run(recipe, count, Path(folder) / f"{number}-{count}")
                speeds[count].append(_tokens_per_second(events))
                said = said or _said(events)
                print(f"run {number + 1}: {count} processes {speeds[count][-1]:,.0f} tokens/s", flush=True)
    most = -(-asked.batch // asked.processes)
    one, several = (statistics.median(speeds[count]) for count in (1, asked.processes))
    print(f"\nload average {os.getloadavg()[0]:.1f}; {said}")
    print(f"1 process {one:,.0f} tokens/s, {asked.processes} processes {several:,.0f}: {several / one:.2f} times")
    print(f"at most {asked.batch / most:.2f} times: the busiest of them computes {most} of {asked.batch} micro-batches")


def _recipe(folder: Path, asked: argparse.Namespace) -> Path:
    words = [f"the price of lamp {number} is {number * 7 % 90 + 10} euros" for number in range(asked.length)]
    text = json.dumps({"text": ". ".join(words * WORDS_OF_A_ROW)})
    rows = folder / "rows.jsonl"
    rows.write_text(f"{text}\n" * asked.batch)
    recipe = folder / "bench.toml"
    recipe.write_text(
        f'[model]\nbase = "{asked.base.resolve()}"\n[[data.train]]\npath = "rows.jsonl"\nformat = "text"\n'
        f'[data]\nmax_length = {asked.length}\npacking = false\ntruncation = "cut"\neval_fraction = 0.0\n'
        f"[train]\nmax_steps = {asked.steps}\nbatch_size = {asked.batch}\nmicro_batch_size = 1\n"
        '[eval]\nsamples = 0\n[report]\nsinks = ["jsonl"]\n[checkpoint]\nevery_steps = 100000\n'
    )
    return recipe


def _run(recipe: Path, count: int, place: Path) -> list[dict[str, Any]]:
    """The events of one run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "QLORA_CACHE": str(place / "cache")}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    words = [*launcher, "-m", "qlora.cli.train", str(recipe), "--set", f"output.dir={place}"]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{count} processes ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    lines = (place / recipe.stem / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _tokens_per_second(events: list[dict[str, Any]]) -> float:
    steps = [event for event in events if event["event"] == "step"][WARM_UP:]
    tokens, seconds = (statistics.median(float(event[key]) for event in steps) for key in ("tokens", "seconds"))
    return tokens / seconds


def _said(events: list[dict[str, Any]]) -> str:
    """What a run of several processes says of the bytes of a step; nothing of a run of one."""
    messages = (event["message"] for event in events if event.get("topic") == "processes")
    found = (re.search(r"[\d.,]+ MiB a step are added up", message) for message in messages)
    return next((one[0] for one in found if one), "")


if __name__ == "__main__":
    main()
