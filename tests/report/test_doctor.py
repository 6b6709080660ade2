"""A doctor's lines on a terminal, in a pipe, in ASCII; and the table of caches."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from qlora.doctor.caches import Kept
from qlora.doctor.finding import Finding, green, red, yellow
from qlora.report.console import Terminal
from qlora.report.doctor import draw, draw_caches, verdict

LONG = red("torch", "it cannot be imported because " + "of a reason " * 12, "pip install --upgrade torch", "/home/x")


def drawn(line: Finding, terminal: bool, width: int = 60) -> str:
    out = io.StringIO()
    draw(line, Terminal(out, force_terminal=terminal, width=width, color_system="standard" if terminal else None))
    return out.getvalue()


def test_a_pipe_gets_plain_lines_that_do_not_wrap() -> None:
    first, second = drawn(LONG, terminal=False).splitlines()
    assert first.startswith("error   torch ") and first.rstrip().endswith("(/home/x)") and len(first) > 150
    assert second.strip() == "> pip install --upgrade torch"
    assert drawn(green("RAM", "7 GiB"), terminal=False) == f"{'ok':8}{'RAM':16} 7 GiB\n"


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_a_terminal_gets_colours_and_a_column(width: int) -> None:
    text = drawn(LONG, terminal=True, width=width)
    assert "\x1b[1;31m" in text and "\x1b[33m" in drawn(yellow("a", "b", "c"), terminal=True)
    if width >= 60:
        assert all(line.startswith(" " * 25) for line in text.splitlines()[1:])


def test_markup_and_secrets_of_others_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret00")
    text = drawn(red("hub", "[red]x[/red] hf_secretsecretsecret00", "hf_secretsecretsecret00"), terminal=False)
    assert "[red]x[/red]" in text and "secretsecret" not in text


def test_the_verdict() -> None:
    assert verdict({"green": 3, "yellow": 2, "red": 0}).plain == "3 ok, 2 warnings: training works here"
    assert verdict({"green": 3, "yellow": 0, "red": 1}).plain == "3 ok, 1 error: mend the errors first"


@pytest.mark.parametrize("terminal", [True, False])
def test_caches_are_a_table_or_lines(terminal: bool) -> None:
    out = io.StringIO()
    console = Terminal(out, width=100, force_terminal=terminal)
    long = Path("/c") / ("a" * 120 + "\x1b[2J")
    draw_caches([Kept("tokens", long, 5, "rows"), Kept("hub", Path("/h"), 7 << 20, "models", "not ours")], console)
    text = out.getvalue()
    assert "7.0 MiB" in text and "(stays: not ours)" in text and "\x1b[2J" not in text
    assert terminal or len(text.splitlines()) == 2
    draw_caches([], console)
    assert "no caches" in out.getvalue()
