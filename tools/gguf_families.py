"""Every family of GGUF files shown on tiny random models with sharp answers, against llama.cpp, with its faults.

    python tools/gguf_families.py
    python tools/gguf_families.py --only granite --faults

Prints for each: mean entropy as a share of log V, mean KL in nats of the f32 and of the q8_0 file against transformers,
and the least of the faults, each planted alone. Exit code 1: a family is not exact to 1e-6 in f32, or a fault stays
below 1e-3. Needs xllamacpp.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.export.gguf.families.cases import EXACT, SEEN, VOCAB, Case, show
from tests.export.gguf.families.dense_cases import CASES as DENSE
from tests.export.gguf.families.gemma_cases import CASES as GEMMA
from tests.export.gguf.families.recurrent_cases import CASES as RECURRENT

CASES = (*DENSE, *GEMMA, *RECURRENT)


def line(case: Case, every_fault: bool) -> tuple[str, bool]:
    """A row of the table, and whether all of it is as it must be."""
    with tempfile.TemporaryDirectory() as folder:
        shown = show(case, Path(folder), ("f32", "q8_0"), isolated=True)
    seen = {name: kl for name, kl in shown.faults.items() if kl is not None}
    least = min(seen, key=lambda name: seen[name], default="")
    right = shown.kl["f32"] <= EXACT and all(kl > SEEN for kl in seen.values())
    refused = [name for name, kl in shown.faults.items() if kl is None]
    cells = [
        case.name,
        f"{shown.entropy / math.log(VOCAB):.2f}",
        f"{shown.kl['f32']:.1e}",
        f"{shown.kl['q8_0']:.1e}",
        f"{len(shown.faults)}",
        f"{seen[least]:.1e} ({least})" if seen else "",
        ", ".join(f"{name}: will not load" for name in refused),
    ]
    if every_fault:
        cells.append(", ".join(f"{name} {kl:.1e}" for name, kl in sorted(seen.items(), key=lambda item: item[1])))
    return f"| {' | '.join(cells)} |", right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--faults", action="store_true", help="print the KL of every fault")
    options = parser.parse_args()
    print("| family | entropy / log V | KL f32 | KL q8_0 | faults | least fault | refused by llama.cpp |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    wrong = 0
    for case in CASES:
        if options.only in case.name:
            text, right = line(case, options.faults)
            print(text if right else f"{text} WRONG", flush=True)
            wrong += not right
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
