"""What a person sees: nothing breaks in a narrow terminal, outside of one, or on text that looks like markup."""

from __future__ import annotations

import dataclasses
import io
import re
import sys

import pytest

from qlora.events import (
    End,
    Evaluated,
    Event,
    Examined,
    Exported,
    Fidelity,
    Notice,
    Plan,
    Progress,
    Recovered,
    Rejected,
    Sampled,
    Saved,
    Start,
    StepDone,
)
from qlora.report.console import ConsoleSink, Terminal
from tests.report.cases import FIGURES

PLAN = Plan(
    450,
    60,
    8,
    16000,
    4000,
    1,
    1,
    1,
    80,
    10.0,
    700_000,
    5_200_000,
    True,
    False,
    2048,
    "8 packs ÷ 1 = 8 steps",
    {"peak_bytes": 3 << 29, "limit_bytes": 6 << 30, "changes": {"train.micro_batch_size": 4}},
)
EVENTS: list[Event] = [
    Start("quickstart", "/runs/quickstart", "owner/name", "0123456789abcdef", "cpu", {"torch": "2"}, None),
    Progress("load", 1, 4, "bytes"),
    Progress("load", 4, 4, "bytes"),
    Rejected("rows.jsonl", "longer than 2,048 tokens", 3, ("rows.jsonl:4",)),
    Notice("template", "the base has no chat template: ChatML is used"),
    PLAN,
    Evaluated(0, 5.0, 148.4, 0.0, 60, False),
    *(StepDone(n, n / 8, 5 / n, 1e-3, 0.5, 2000, 500, 900.0, 1 << 30, 2.0) for n in range(1, 81)),
    Recovered(3, "loss not finite: step skipped"),
    Evaluated(80, 0.1, 1.1, None, 60, True),
    Examined(FIGURES),
    Sampled(80, "What does [red]the Lumo lamp[/] cost?", "40 euros", "[/]blue", "40 euros"),
    Saved("adapter", 80, "/runs/quickstart/adapter", 1 << 20),
    End(
        "finished",
        80,
        80,
        160.0,
        160000,
        40000,
        0.06,
        0.1,
        0.0,
        0.95,
        1 << 30,
        "/runs/[x]/adapter",
        80,
        {"peak": {"predicted": 3 << 29, "measured": 1 << 30}, "weights": {"predicted": 7 << 20, "measured": 6 << 20}},
        {"load": 0.2, "evaluation": 20.0, "training": 130.0},
    ),
]


def drawn(width: int, terminal: bool) -> str:
    out = io.StringIO()
    console = Terminal(out, width=width, force_terminal=terminal)
    sink = ConsoleSink(console)
    for event in EVENTS:
        sink.emit(event)
    sink.close()
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_every_event_is_drawn_at_every_width(width: int, terminal: bool) -> None:
    text = drawn(width, terminal)
    assert "finished at step 80" in text and "exact match" in text


def test_predicted_memory_stands_beside_measured() -> None:
    text = " ".join(drawn(200, False).split())
    assert "1.5 GiB predicted at the peak, 6.0 GiB allowed; chosen to fit: train.micro_batch_size = 4" in text
    assert "1.0 GiB (predicted 1.5 GiB); weights 6.0 MiB (7.0 MiB)" in text


def test_the_end_says_where_the_time_went() -> None:
    assert "time training 2 min 10 s · evaluation 20 s " in " ".join(drawn(200, False).split())


def test_text_of_rows_is_never_markup() -> None:
    assert "[red]the Lumo lamp[/]" in drawn(80, False)


@pytest.mark.parametrize("terminal", [True, False])
def test_text_that_is_no_markup_of_anybodys_is_drawn_as_it_is(terminal: bool) -> None:
    """`[/]` alone ends the drawing of whoever takes it for markup; `:warning:` is an emoji's name."""
    odd = "[/] [red]x[/red] [link=http://x]y[/link] :warning: \\[z]"
    out = io.StringIO()
    console = Terminal(out, width=400, force_terminal=terminal)
    sink = ConsoleSink(console)
    entry = {"name": odd, "measured_by": odd, "kl": 0.1, "perplexity": 1.0, "top1": 1.0, "bytes": 1}
    table = dataclasses.replace(PLAN, arithmetic=odd, memory={"peak_bytes": 1, "limit_bytes": 1, "changes": {odd: odd}})
    texts: list[Event] = [
        Start(odd, odd, odd, odd, odd, {odd: odd}, None),
        *(Progress(odd, done, total) for done, total in ((0, 1), (1, 9))),
        table,
        StepDone(1, 0.1, 1.0, 1e-3, 0.5, 1, 1, 1.0, 1, 2.0),
        Notice(odd, odd),
        Rejected(odd, odd, 2, (odd,)),
        Recovered(1, odd),
        Sampled(1, odd, odd, odd, odd),
        Saved(odd, 1, odd, 1),
        Fidelity(odd, 1, 1, (entry,)),
        Exported(odd, odd, 1, odd, None),
        End(odd, 1, 1, 1.0, 1, 1, 0.5, None, None, None, 1, odd, 1),
    ]
    for event in texts:
        sink.emit(event)
    if terminal:
        console.print(sink.picture())
    sink.close()
    plain = "".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).split())
    assert plain.count("".join(odd.split())) >= 20


def test_a_terminal_that_cannot_be_drawn_over_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    sink = ConsoleSink(Terminal(out, width=80, force_terminal=True))
    for event in EVENTS:
        sink.emit(event)
    sink.close()
    assert "step 80/80" in out.getvalue() and "\x1b" not in out.getvalue()


def test_what_is_printed_beside_the_panel_does_not_go_through_rich(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take the sequences of a library's warning for colours and links of its own."""
    before = sys.stderr
    sink = ConsoleSink(Terminal(io.StringIO(), width=80, force_terminal=True))
    sink.emit(EVENTS[1])
    assert sink.live is not None and sys.stderr is before
    sink.close()


def test_plain_output_has_no_escape_codes_and_is_short() -> None:
    text = drawn(100, False)
    assert "\x1b" not in text
    assert "step 1/80" in text and "step 80/80" in text
    assert len(text.splitlines()) < 45


def test_lines_fit_an_80_column_terminal_panel() -> None:
    out = io.StringIO()
    console = Terminal(out, width=80, force_terminal=True)
    sink = ConsoleSink(console)
    for event in EVENTS[:20]:
        sink.emit(event)
    console.print(sink.picture())
    sink.close()
    assert "left" in out.getvalue()


def test_lines_of_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.report.console.PLAIN_SECONDS", -1.0)
    out = io.StringIO()
    sink = ConsoleSink(Terminal(out, width=80))
    for done in (0, 159285888):
        sink.emit(Progress("load", done, 269030016, "B"))
    sink.close()
    assert out.getvalue() == "load 151.9 of 256.6 MiB (59 %)\n"


def test_work_of_one_part_shows_its_beginning_without_a_terminal() -> None:
    """It may take minutes (a dry run without a GPU), and would otherwise be silent until it has ended."""
    out = io.StringIO()
    sink = ConsoleSink(Terminal(out, width=80))
    sink.emit(Progress("dry run", 0, 1))
    assert out.getvalue() == "dry run …\n"
    sink.emit(Progress("dry run", 1, 1))
    sink.close()
    assert out.getvalue() == "dry run …\n"
