"""tests/golden/errors.txt: of each door, named inputs with their exit code and what the person reads, word for word."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.attacks.fuzz import named_documents, named_files, named_words
from tests.attacks.fuzz.harness import Fuzzer, Outcome
from tests.attacks.fuzz.named_files import Named

FILE = Path(__file__).parents[2] / "golden" / "errors.txt"
NAMED: Mapping[str, Named] = {
    "base": named_files.BASES,
    "adapter": named_files.ADAPTERS,
    "run": named_files.RUNS,
    "rows": named_files.ROWS,
    "documents": named_documents.DOCUMENTS,
    "recipe": named_words.RECIPES,
    "cache": named_files.CACHES,
    "current folder": named_words.HERE,
    "terminal": named_words.TERMINAL,
}
# Notices that any good input has.
USUAL = ("rows:", "split:", "format:", "gguf:", "model:", "memory:", "cache: rows were tokenized before", "versions:")


def written(fuzzer: Fuzzer, outcomes: Iterable[Outcome]) -> str:
    """The file's content."""
    by_name = {(outcome.door, outcome.index): outcome for outcome in outcomes}
    parts = []
    for door, names in NAMED.items():
        parts.append(f"## {door}")
        parts += ["\n".join([name, *_told(fuzzer, by_name[door, name])]) for name in names]
    return "\n\n".join(parts) + "\n"


def _told(fuzzer: Fuzzer, outcome: Outcome) -> list[str]:
    """The exit code and its lines; of what went well, the notices."""
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    if outcome.code == 0:
        notices = [line for line in outcome.out.splitlines() if re.match(r"[a-z ]+: ", line)]
        lines += [line for line in notices if not line.startswith(USUAL)][:3]
    if outcome.fault:
        lines = [f"FINDING {outcome.fault}"]
    return [f"  exit {outcome.code}", *(f"  {_placed(fuzzer, line.rstrip())}" for line in lines)]


def _placed(fuzzer: Fuzzer, line: str) -> str:
    """The line with this machine's paths and numbers by their names."""
    goods = fuzzer.goods
    line = re.sub(rf"{re.escape(str(fuzzer.scratch))}/\d+/place", "<here>", line)
    line = re.sub(rf"{re.escape(str(fuzzer.scratch))}/\d+", "<above>", line)
    names = {goods.run: "<run>", goods.base: "<base>", goods.recipe.parent: "<project>", goods.home: "<home>"}
    for place, name in names.items():
        line = line.replace(str(place), name)
    line = re.sub(r"tokens/[0-9a-f]{32}", "tokens/<key>", line)
    line = re.sub(r"(its tokenizer cannot be opened) \(.*\)", r"\1 (<what the library says>)", line)
    line = line.replace(os.uname().nodename, "<machine>")
    line = re.sub(r"bytes, not \d+", "bytes, not <number>", line)  # a state holds its seconds
    line = re.sub(r"UTF-8 text \(byte \d+\)", "UTF-8 text (byte <number>)", line)  # behind the paths of this machine
    return re.sub(r"process \d+", "process <number>", line)


def sections(text: str) -> dict[str, str]:
    """The file's text by door."""
    return {part.partition("\n")[0]: part for part in text.removeprefix("## ").split("\n\n## ")}
