"""Breaks each rule that tests/faults/README.md lists, in a copy of the tree, and sees the named test fail.

    python tools/break_rules.py --only Saving
    python tools/break_rules.py --jobs 2
    python tools/break_rules.py --relocate

A row of the tables there is `| rule | the break | the test that failed |`. A break names a file and one change in it:

    `file`: `old` becomes `new`            the text stands once in the file
    `file`: `line` taken out               the line, which stands once, becomes `pass` at its indentation
    `file`: `new` put before `line`        a line of its own, at the indentation of the one that stands once

`file::function` is for a text that stands in the file more than once: only that function's lines count.

First every named test must pass as the tree stands. Exit code 1: a test passed in spite of its break, or a row has no
text or test to go by. `--relocate` writes new paths into rows whose text or test stands in one other file now.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = Path("tests/faults/README.md")
TESTS_FAILED = 1  # pytest's exit code; a test that cannot be collected or found has another
SECONDS = 600

_CODE = r"`((?:[^`\\]|\\.)+)`"
_BREAK = re.compile(rf"{_CODE}: {_CODE} (?:becomes {_CODE}|(taken out)|put before {_CODE})")


class CannotBreak(Exception):
    """A row that does not fit the tree; the text says why."""


@dataclass(frozen=True)
class Rule:
    """One row: the sentence, the text that is changed and how, and the test that must fail."""

    section: str
    text: str
    file: str
    function: str  # "" for the whole file
    old: str
    change: Callable[[str], str]  # of a text in which `old` stands once
    test: str

    def broken(self, content: str) -> str:
        """The file's content with the rule broken. Raises CannotBreak."""
        begin, end = _lines_of(self.function, content)
        lines = content.split("\n")
        part = "\n".join(lines[begin:end])
        if (found := part.count(self.old)) != 1:
            near = difflib.get_close_matches(self.old, [line.strip() for line in lines], 1, 0.5)
            hint = f"; near: {near[0]}" if near and not found else ""
            raise CannotBreak(f"{self.file}: `{self.old}` stands there {found} times{hint}")
        broken = "\n".join([*lines[:begin], self.change(part), *lines[end:]])
        try:
            ast.parse(broken)
        except SyntaxError as error:
            raise CannotBreak(f"{self.file}: is no Python after the break ({error})") from error
        return broken


def _lines_of(function: str, content: str) -> tuple[int, int]:
    """First line and the one after the last of a function, of everything for "". Raises CannotBreak."""
    if not function:
        return 0, content.count("\n") + 1
    kinds = ast.FunctionDef | ast.ClassDef
    found = [node for node in ast.walk(ast.parse(content)) if isinstance(node, kinds) and node.name == function]
    if len(found) != 1:
        raise CannotBreak(f"{function} is defined there {len(found)} times")
    return found[0].lineno - 1, found[0].end_lineno or found[0].lineno


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="rows in which this regular expression is found")
    parser.add_argument("--jobs", type=int, default=1, help="breaks that are tried at the same time")
    parser.add_argument("--relocate", action="store_true", help="follow moved texts and tests, and write the table")
    asked = parser.parse_args()
    lines = (ROOT / TABLE).read_text(encoding="utf-8").splitlines()
    if asked.relocate:
        (ROOT / TABLE).write_text("\n".join(map(_relocated, lines)) + "\n", encoding="utf-8")
        return
    rules, bad = read_rules(lines, re.compile(asked.only))
    with tempfile.TemporaryDirectory() as place:
        bad += try_all(rules, [_copy(Path(place) / str(number)) for number in range(asked.jobs)])
    print(f"{len(rules)} rules broken, {bad} without a test that sees it")
    sys.exit(1 if bad else 0)


# --- the table -------------------------------------------------------------------------------------------------------


def read_rules(lines: Sequence[str], wanted: re.Pattern[str]) -> tuple[list[Rule], int]:
    """The wanted rows, and how many of them cannot be read (reported here)."""
    rules, bad, section = [], 0, ""
    for line in lines:
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if not line.startswith("| ") or line.startswith(("| rule | the break |", "| --- |")):
            continue
        if not wanted.search(f"{section} {line}"):
            continue
        try:
            rules.append(_rule(section, line))
        except CannotBreak as error:
            bad += 1
            _report("UNREADABLE", _cells(line)[0], str(error))
    return rules, bad


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _rule(section: str, line: str) -> Rule:
    text, change, test = _cells(line)
    match = _BREAK.fullmatch(change)
    if match is None:
        raise CannotBreak(f"not a break in one of the three forms: {change}")
    place, first, new, taken_out, anchor = (part and part.replace(r"\|", "|") for part in match.groups())
    file, _, function = place.partition("::")
    test = "tests/" + test.strip("`")

    def broken(content: str) -> str:
        if taken_out:
            return _replace_line(content, first, "pass")
        if anchor:
            return _replace_line(content, anchor, f"{first}\n{{indent}}{anchor}")
        return content.replace(first, new)

    return Rule(section, text, file, function, anchor or first, broken, test)


def _replace_line(content: str, old: str, new: str) -> str:
    """The whole line of `old` becomes `new`, at the same indentation."""
    lines = content.split("\n")
    at = next(number for number, line in enumerate(lines) if old in line)
    if lines[at].strip() != old:
        raise CannotBreak(f"`{old}` is only a piece of the line `{lines[at].strip()}`")
    indent = lines[at][: -len(old)]
    lines[at] = indent + new.replace("{indent}", indent)
    return "\n".join(lines)


def _relocated(line: str) -> str:
    """A row whose file and test are where their text stands now, if that is in one file; other lines unchanged."""
    try:
        rule = _rule("", line)
    except (CannotBreak, ValueError):
        return line
    source = _holder(rule.file, lambda content: rule.old in content, "qlora")
    test_file, _, name = rule.test.partition("::")
    function = f"def {name.partition('[')[0]}("
    test = _holder(test_file, lambda content: function in content, "tests")
    return line.replace(f"| `{rule.file}", f"| `{source}").replace(
        test_file.removeprefix("tests/") + "::", test.removeprefix("tests/") + "::"
    )


def _holder(file: str, holds: Callable[[str], bool], under: str) -> str:
    path = ROOT / file
    if path.is_file() and holds(path.read_text(encoding="utf-8")):
        return file
    found = [path for path in (ROOT / under).rglob("*.py") if holds(path.read_text(encoding="utf-8"))]
    return found[0].relative_to(ROOT).as_posix() if len(found) == 1 else file


# --- the breaks ------------------------------------------------------------------------------------------------------


def try_all(rules: Sequence[Rule], copies: Sequence[Path]) -> int:
    """How many rules have no test that sees them broken; each is reported as soon as it is known."""
    failing = _failing_tests(copies[0], sorted({rule.test for rule in rules}))
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def job(rule: Rule) -> bool:
        copy = free.get()
        began = time.monotonic()
        try:
            verdict, detail = _try(rule, copy, failing)
        finally:
            free.put(copy)
        _report(verdict, rule.text, f"{detail} ({time.monotonic() - began:.0f} s)")
        return verdict != "seen"

    with ThreadPoolExecutor(len(copies)) as pool:
        return sum(pool.map(job, rules))


def _try(rule: Rule, copy: Path, failing: str) -> tuple[str, str]:
    if re.search(rf"{re.escape(rule.test)}(?:\[| |$)", failing, re.MULTILINE):
        return "FAILS ANYWAY", rule.test
    path = copy / rule.file
    try:
        content = path.read_text(encoding="utf-8")
        broken = rule.broken(content)
    except (OSError, CannotBreak) as error:
        return "NO BREAK", str(error)
    try:
        path.write_text(broken, encoding="utf-8")
        code, output = _pytest(copy, [rule.test])
    finally:
        path.write_text(content, encoding="utf-8")
    if code == TESTS_FAILED:
        return "seen", rule.test
    return ("NOT SEEN" if code == 0 else "NO TEST"), f"{rule.test} {_last_line(output)}"


def _failing_tests(copy: Path, tests: Sequence[str]) -> str:
    """pytest's report on the named tests that do not pass in the tree as it stands."""
    code, output = _pytest(copy, tests)
    if code not in (0, TESTS_FAILED):  # a name that is not there: then each is asked for on its own
        return "\n".join(_failing_tests(copy, [test]) for test in tests) if len(tests) > 1 else tests[0]
    return output if code else ""


def _pytest(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output. Slow tests are run too; no byte code is kept, since a break may have the old one's size."""
    command = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", "-rf", "--tb=no", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    seconds = SECONDS * len(tests)
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return TESTS_FAILED, f"took over {seconds} s"
    return done.returncode, done.stdout + done.stderr


def _last_line(output: str) -> str:
    return next((line for line in reversed(output.splitlines()) if line.strip()), "")


def _copy(place: Path) -> Path:
    """The tracked files, as they lie in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


def _report(verdict: str, rule: str, detail: str) -> None:
    print(f"{verdict:12} {rule}: {detail}", flush=True)


if __name__ == "__main__":
    main()
