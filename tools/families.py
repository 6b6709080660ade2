"""The table of families in recipes/MODELS.md: every column of every family, tried on tiny random models.

    python tools/families.py
    python tools/families.py --only gemma3n_text,jamba --columns loads,opens
    python tools/families.py --draw

Each family is tried in a child of its own, which a time limit ends. A line a family is printed, the answers stand in
`build/families.json` with their reasons (those of families that are not asked for stay), and a run of all families,
or `--draw`, writes them into the table. Exit code 1: something is not right.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from qlora.export.gguf.families import FAMILIES as GGUF_FAMILIES  # noqa: E402
from qlora.model import config_filter  # noqa: E402
from qlora.third_party import import_bitsandbytes  # noqa: E402
from tests.all_families import DENSE, FAMILIES, MIXTURES  # noqa: E402
from tests.family_checks import CHECKS, answers  # noqa: E402
from tests.mixtures import MIXTURES as TRIED  # noqa: E402

RESULTS = ROOT / "build" / "families.json"
TABLE = ROOT / "recipes" / "MODELS.md"
TITLES = {
    "loads": "loads in 4 bit",
    "loss": "loss",
    "packing": "packing",
    "trains": "trains",
    "merge": "merge",
    "opens": "export",
    "measured": "measured",
    "gguf": "as GGUF",
}
BOTH = ("jamba_moe", "nemotron_h_moe")  # types that are dense as well
BEGIN, END = "<!-- families: drawn by tools/families.py -->", "<!-- end of families -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--columns", default="", help="columns, separated by commas")
    parser.add_argument("--seconds", type=float, default=300, help="for one family")
    parser.add_argument("--draw", action="store_true", help="write the table from the answers that there are")
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    names = [name for name in asked.only.split(",") if name]
    if not asked.draw:
        _warm()
        for family in names or FAMILIES:
            columns = tuple(name for name in asked.columns.split(",") if name)
            found = _in_child(family, columns, asked.seconds)
            known[family] = {**known.get(family, {}), **found} if columns else found
            print(_line(family, known[family]), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    if asked.draw or not (names or asked.columns):
        _draw(known)
    right = [name for name, found in known.items() if all(holds for holds, _ in found.values())]
    print(f"{len(right)} of {len(known)} families are right in every column")
    sys.exit(0 if len(right) == len(known) else 1)


def _warm() -> None:
    """Everything that a child needs, imported once."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import peft  # noqa: F401

    import_bitsandbytes()
    config_filter.reduce_config({"model_type": "llama"})  # reads the source that all configurations share
    torch.set_num_threads(1)


def _in_child(family: str, columns: tuple[str, ...], seconds: float) -> dict[str, list[object]]:
    """The answers of a forked child; what it has not said when its time is up is an answer too."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.setpgrp()
        _child(family, columns, write)
    os.close(write)
    text, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([read], [], [], 0.5)[0]:
            piece = os.read(read, 1 << 16)
            if not piece:
                break
            text += piece
    os.close(read)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = dict(json.loads(line) for line in text.splitlines())
    if len(found) < (len(columns) or (1 if family in MIXTURES else len(CHECKS))):
        found["end"] = [False, f"internal error: it ended, or {seconds:.0f} s were over"]
    return found


def _child(family: str, columns: tuple[str, ...], write: int) -> None:
    sys.stderr = io.StringIO()  # libraries' warnings
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            for answer in answers(family, Path(folder), columns):
                os.write(write, json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(0)


def _line(family: str, found: dict[str, list[object]]) -> str:
    wrong = [f"{column}: {text}" for column, (right, text) in found.items() if not right]
    return f"{'ok ' if not wrong else 'BAD'} {family:20} " + " | ".join(
        wrong or [str(found.get("loads", ["", ""])[1])[:100]]
    )


def table(known: dict[str, dict[str, list[object]]]) -> str:
    """The answers as a table, a row a dense family, and a line that names the mixtures."""
    lines = ["| `model_type` | " + " | ".join(TITLES.values()) + " |", "| --- |" + " --- |" * len(TITLES)]
    for family in (name for name in DENSE if name in known):
        found = known[family]
        cells = [_cell(family, column, *found[column]) if column in found else "not asked" for column in TITLES]
        if not found.get("loads", [True])[0]:
            cells = [cells[0], *("–" for _ in cells[1:])]
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    said = {family: str(known[family].get("loads", ["", ""])[1]) for family in MIXTURES if family in known}
    untried = [family for family, text in said.items() if "held" in text and family not in TRIED and family not in BOTH]
    refused = [family for family, text in said.items() if "refused" in text and family not in TRIED]
    lines += ["", f"Mixtures of experts, held in 4 bit expert by expert (`tests/mixtures.py`): {_names(TRIED)}."]
    lines += [
        "",
        f"Through the same interface, not tried: {_names(untried)}. Refused by their configuration: {_names(refused)}.",
    ]
    return "\n".join(lines)


def _names(families: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(families))


def _cell(family: str, column: str, right: object, text: object) -> str:
    """What stands in the table: a word where all is well, else the reason."""
    words = str(text).replace("|", "/").replace("\n", " ")
    words = re.sub(r"/\S+/base: (config\.json: )?", "", words)
    if not right:
        return f"**no**: {words}"
    if column == "gguf":
        if words.startswith("yes"):
            return "yes, `" + words.removeprefix("yes, ").partition(",")[0] + "`"
        reason = words.partition(" (")[0].removeprefix("refused: ")
        return f"yes, but for this one: {reason}" if family in GGUF_FAMILIES else "no"
    if column == "packing":
        return "safe" if words.startswith("safe") and words.endswith("on") else "off"
    return "yes"


def _draw(known: dict[str, dict[str, list[object]]]) -> None:
    """The table between the markers of MODELS.md."""
    head, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    TABLE.write_text(f"{head}{BEGIN}\n\n{table(known)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
