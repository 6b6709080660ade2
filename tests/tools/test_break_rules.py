"""The table of what breaks on purpose follows the code: each break can be made, each named test is there."""

from __future__ import annotations

import re

import pytest

from tools.break_rules import ROOT, TABLE, CannotBreak, Rule, read_rules

RULES, UNREADABLE = read_rules((ROOT / TABLE).read_text(encoding="utf-8").splitlines(), re.compile(""))


def test_every_row_can_be_read() -> None:
    assert UNREADABLE == 0 and len(RULES) >= 60


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
def test_the_break_can_be_made_and_its_test_exists(rule: Rule) -> None:
    content = (ROOT / rule.file).read_text(encoding="utf-8")
    assert rule.broken(content) != content
    file, _, name = rule.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


ROW = "| rule | `a.py`: {} | `test_a.py::test_it` |"
CONTENT = "def one():\n    call()\n\ndef two():\n    check = 1\n    call()\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("`check = 1` becomes `check = 2`", CONTENT.replace("check = 1", "check = 2")),
        ("`check = 1` taken out", CONTENT.replace("check = 1", "pass")),
        ("`done()` put before `check = 1`", CONTENT.replace("check = 1", "done()\n    check = 1")),
    ],
)
def test_three_forms_of_a_break(change: str, expected: str) -> None:
    (rule,), _ = read_rules([ROW.format(change)], re.compile(""))
    assert rule.broken(CONTENT) == expected
    assert rule.test == "tests/test_a.py::test_it"


def test_a_function_of_a_file_can_be_named() -> None:
    (rule,), _ = read_rules([ROW.format("`call()` taken out").replace("a.py`:", "a.py::two`:")], re.compile(""))
    assert rule.broken(CONTENT) == CONTENT[: -len("call()\n")] + "pass\n"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("`call()` taken out", "stands there 2 times"),
        ("`check = 3` taken out", "near: check = 1"),
        ("`check` taken out", "only a piece"),
        ("`check = 1` becomes `check = (`", "is no Python"),
    ],
)
def test_what_cannot_be_broken_is_an_error(change: str, fault: str) -> None:
    (rule,), _ = read_rules([ROW.format(change)], re.compile(""))
    with pytest.raises(CannotBreak, match=fault):
        rule.broken(CONTENT)


def test_a_row_in_prose_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rules, unreadable = read_rules([ROW.format("a line taken out")], re.compile(""))
    assert not rules and unreadable == 1
    assert "not a break in one of the three forms" in capsys.readouterr().out
