"""Anything at all through nine doors, and what a person reads of it: two lines, within 5 s and 1 GiB, files untouched.

Fifty inputs a door here, seventy-five more where slow tests run; ten thousand: `python tools/fuzz.py --count 10000`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.fuzz import golden
from tests.attacks.fuzz.doors import DOORS

ROOT = Path(__file__).parents[2]
FEW, MANY = 50, 75


def fuzz(*words: str) -> list[dict[str, Any]]:
    """The outcomes of the command, in processes of its own: what an input takes is seen from outside."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "fuzz.py"), "--json", "--jobs", "2", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert outcomes, done.stderr
    return outcomes


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Outcomes of a few inputs of each door, and the messages of the named ones."""
    file = tmp_path_factory.mktemp("golden") / "errors.txt"
    return fuzz("--count", str(FEW), "--errors", str(file)), file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def many() -> list[dict[str, Any]]:
    return fuzz("--count", str(MANY), "--seed", "2")


def check(outcomes: list[dict[str, Any]], door: str, count: int) -> None:
    of_door = [outcome for outcome in outcomes if outcome["door"] == door]
    findings = [(outcome["index"], outcome["fault"], outcome["detail"]) for outcome in of_door if outcome["fault"]]
    assert not findings, findings[0]
    assert len(of_door) == len(range(0, count, DOORS[door].every))
    ends = {(outcome["code"], re.sub(r"\d+", "", outcome["out"] + outcome["err"])) for outcome in of_door}
    assert len(ends) > 1, "every input had the same end: the door is shut, or wide open"


@pytest.mark.parametrize("door", DOORS)
def test_fifty_inputs(few: tuple[list[dict[str, Any]], str], door: str) -> None:
    check(few[0], door, FEW)


@pytest.mark.every
@pytest.mark.parametrize("door", DOORS)
def test_more_inputs(many: list[dict[str, Any]], door: str) -> None:
    check(many, door, MANY)


@pytest.mark.parametrize("door", golden.NAMED)
def test_messages_word_for_word(few: tuple[list[dict[str, Any]], str], door: str) -> None:
    """Written anew with `python tools/fuzz.py --errors`; the difference is for a person to read."""
    assert len(golden.NAMED[door]) >= 20
    written, held = golden.sections(few[1]), golden.sections(golden.FILE.read_text(encoding="utf-8"))
    assert written[door] == held[door]


def test_no_named_input_is_a_finding() -> None:
    text = golden.FILE.read_text(encoding="utf-8")
    assert "FINDING" not in text and "exit 1\n" not in text and "internal error" not in text
