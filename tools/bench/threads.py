"""How OpenMP's threads should wait: seconds a step of the quickstart, alone and beside two busy processes.

    python tools/bench/threads.py [--runs 5] [--steps 8] [--pair] [--settings GOMP_SPINCOUNT=1000 ...]

A setting is a variable of the environment. GOMP_SPINCOUNT is how often a waiting thread of libgomp looks before it
sleeps: 300,000 times by itself (libgomp manual, "GOMP_SPINCOUNT"); KMP_BLOCKTIME how many milliseconds one of libomp
does: 200 (LLVM OpenMP, "Environment Variables"; to try it on Linux, LD_PRELOAD a libomp). The settings take turns, so
that a machine that changes its speed changes all of them; a figure is the median over runs of each run's median step.
`--pair` times two trainings side by side as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUSY_PROCESSES = 2
SETTINGS = ["OMP_WAIT_POLICY=passive", *(f"GOMP_SPINCOUNT={count}" for count in (300000, 30000, 10000, 4000, 1000))]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--pair", action="store_true")
    asked = parser.parse_args()
    loads = ("idle", "busy", "pair") if asked.pair else ("idle", "busy")
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(asked.runs):
        for load in loads:
            for setting in asked.settings:
                took = _run(setting, load, asked.steps)
                seconds.setdefault((setting, load), []).append(took)
                print(f"run {number + 1} {load:5} {setting:24} {took:.2f} s a step", flush=True)
    print(f"\n{'setting':24}" + "".join(f"{load:>10}" for load in loads))
    for setting in asked.settings:
        medians = [statistics.median(seconds[setting, load]) for load in loads]
        print(f"{setting:24}" + "".join(f"{median:9.2f}s" for median in medians))


def _run(setting: str, load: str, steps: int) -> float:
    """The median step of one training; of the slower one where two run side by side."""
    with ExitStack() as stack:
        if load == "busy":
            stack.enter_context(_busy())
        places = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2 if load == "pair" else 1)]
        trainings = [_start(setting, place, steps) for place in places]
        for training in trainings:
            if training.wait() != 0:
                raise SystemExit(f"a training ended with exit code {training.returncode}")
        return max(_median_step(place) for place in places)


def _start(setting: str, place: Path, steps: int) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    # What a command finds set it leaves alone: each setting here is what is measured.
    environment |= {"QLORA_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}
    name, _, value = setting.partition("=")
    environment[name] = value
    command = [
        *(sys.executable, "-m", "qlora.cli.train", str(ROOT / "recipes" / "quickstart.toml")),
        *("--set", f"train.max_steps={steps}", "--set", "eval.samples=0", "--set", "eval.exact_match_rows=0"),
        *("--set", f"output.dir={place}", "--set", "report.sinks=['jsonl']"),
    ]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=place)


@contextmanager
def _busy() -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY_PROCESSES)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _median_step(place: Path) -> float:
    lines = (place / "quickstart" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event["seconds"] for line in lines if (event := json.loads(line))["event"] == "step"]
    return float(statistics.median(steps[1:]))  # the first step warms up


if __name__ == "__main__":
    main()
