"""Sends what strangers could send through the nine doors of this program, thousands of inputs a door.

    python tools/fuzz.py --count 10000 --jobs 2
    python tools/fuzz.py --door adapter --count 1000 --seed 7
    python tools/fuzz.py --replay adapter:17
    python tools/fuzz.py --errors          rewrites tests/golden/errors.txt
    python tools/fuzz.py --payloads        counts what tests/attacks sends through each door

An input is a function of (door, seed, index). A table at the end: inputs, how many were fine and refused, findings, the
slowest one and the largest growth of memory. Exit code 1: there were findings, each of them shown before the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a child forked from threads would hang

# The door of each file of tests/attacks; of the messages of named inputs, each has its own.
FILES = {
    "test_bases": "base",
    "test_templates": "base",
    "test_tokenizers": "base",
    "test_kept_bases": "base",
    "test_adapters": "adapter",
    "test_changed_under_its_feet": "run",
    "test_links": "run",
    "test_ownership": "run",
    "test_data": "rows",
    "test_rows_of_strangers": "rows",
    "test_recipes": "recipe",
    "test_secrets": "terminal",
    "test_terminal": "terminal",
}
NOT_ATTACKS = ("test_fuzz", "test_fuzz_harness")
ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.attacks.fuzz import golden  # noqa: E402
from tests.attacks.fuzz.doors import DOORS, fuzzer_in  # noqa: E402
from tests.attacks.fuzz.harness import Fuzzer, Item, Outcome  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--door", choices=[*DOORS], action="append", help="only this one; repeatable")
    parser.add_argument("--count", type=int, default=1000, help="inputs a door")
    parser.add_argument("--first", type=int, default=0, help="index of the first input")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="children at a time")
    parser.add_argument("--json", action="store_true", help="print every outcome as a line of JSON")
    parser.add_argument("--errors", type=Path, nargs="?", const=golden.FILE, help="write the messages of named inputs")
    parser.add_argument("--payloads", action="store_true", help="count the single attacks of tests/attacks by door")
    parser.add_argument("--replay", metavar="DOOR:INDEX", help="one input, with its traceback")
    asked = parser.parse_args()
    if asked.payloads:
        print(payload_table(payloads()))
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        fuzzer = fuzzer_in(Path(place), asked.seed)
        gc.freeze()  # what every child begins with is left out of its searches for garbage
        if asked.errors:
            named = [(door, name) for door, names in golden.NAMED.items() for name in names]
            asked.errors.write_text(golden.written(fuzzer, fuzzer.run(named, asked.jobs)), encoding="utf-8")
        wanted: list[Item] = []
        if asked.replay:
            door, _, index = asked.replay.partition(":")
            wanted = [(door, int(index) if index.isdecimal() else index)]
        elif not asked.errors or asked.json:
            numbers = range(asked.first, asked.first + asked.count)
            wanted = [
                (door, index) for door in asked.door or DOORS for index in numbers if index % DOORS[door].every == 0
            ]
        found = report(fuzzer, wanted, asked.jobs, asked.json, bool(asked.replay))
    sys.exit(1 if found else 0)


def report(fuzzer: Fuzzer, wanted: Sequence[Item], jobs: int, as_json: bool, whole: bool) -> int:
    """Run and print; how many findings there were."""
    outcomes: dict[str, list[Outcome]] = {}
    start = time.monotonic()
    for outcome in fuzzer.run(wanted, jobs):
        outcomes.setdefault(outcome.door, []).append(outcome)
        if as_json:
            print(json.dumps(asdict(outcome)), flush=True)
        elif outcome.fault or whole:
            print(
                f"{outcome.door}:{outcome.index}: exit code {outcome.code}: {outcome.fault or 'no finding'}", flush=True
            )
            if whole:
                print(outcome.out + outcome.err + outcome.detail)
            else:
                print("\n".join(outcome.detail.strip().splitlines()[-7:]), flush=True)
    if not as_json and outcomes:
        print(table(outcomes))
        print(f"{sum(map(len, outcomes.values()))} inputs in {time.monotonic() - start:.0f} s")
    return sum(bool(outcome.fault) for door in outcomes.values() for outcome in door)


def table(outcomes: dict[str, list[Outcome]]) -> str:
    rows = ["| door | inputs | fine | refused | findings | slowest | most memory |", "| --- " + "| ---: " * 6 + "|"]
    for door, found in outcomes.items():
        faults = sum(bool(outcome.fault) for outcome in found)
        refused = sum(outcome.code != 0 and not outcome.fault for outcome in found)
        slowest = max(outcome.seconds for outcome in found) * 1000
        most = max(outcome.growth_bytes for outcome in found) / 2**20
        fine = len(found) - faults - refused
        rows.append(
            f"| {door} | {len(found):,} | {fine:,} | {refused:,} | {faults} | {slowest:,.0f} ms | {most:,.0f} MiB |"
        )
    return "\n".join(rows)


def payloads() -> dict[str, int]:
    """Single cases by door: what pytest collects from tests/attacks, slow ones too, and the named inputs."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "", "tests/attacks"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    counts = {door: len(names) for door, names in golden.NAMED.items()}
    for line in listed.splitlines():
        file = Path(line.partition("::")[0]).stem
        if "::" in line and file not in NOT_ATTACKS:
            counts[FILES[file]] += 1
    return counts


def payload_table(counts: dict[str, int]) -> str:
    rows = [f"| {door} | {count:,} |" for door, count in [*counts.items(), ("all", sum(counts.values()))]]
    return "\n".join(["| door | payloads |", "| --- | ---: |", *rows])


if __name__ == "__main__":
    main()
