"""Draws the picture of README.md: what a terminal shows in the middle of a run.

    python tools/draw_panel.py runs/quickstart

Reads the events of a run that has ended, up to a few steps after the last answers before two thirds of it, and draws
them as the command does. No font is fetched: the letters are those of the reader's own monospaced font, stretched to
the columns of a terminal.
"""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from pathlib import Path
from typing import Any

from rich.terminal_theme import DIMMED_MONOKAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora import events
from qlora.report.console import ConsoleSink, Terminal, sample_table
from qlora.report.files import read_events

PICTURE = Path(__file__).resolve().with_name("panel.svg")
SHARE, FURTHER = 2 / 3, 12  # of the steps, and steps after the answers
COLUMNS = 72
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
KINDS = {kind.kind: kind for kind in events.Event.__subclasses__()}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    recorded = [event_of(line) for line in read_events(Path(sys.argv[1]) / events.EVENTS_FILE)]
    PICTURE.write_text(picture(recorded), encoding="utf-8")
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


def picture(recorded: list[events.Event]) -> str:
    """The SVG of a run's events."""
    shown = until_the_middle(recorded)
    console = Terminal(io.StringIO(), record=True, width=COLUMNS)
    state = ConsoleSink(Terminal(io.StringIO(), width=COLUMNS))
    for event in shown:
        state.emit(event)
    answers = [event for event in shown if isinstance(event, events.Sampled)]
    evaluated = [event for event in shown if isinstance(event, events.Evaluated)]
    if evaluated and evaluated[-1].loss is not None:
        console.print(f"evaluation at step {evaluated[-1].step}: loss {evaluated[-1].loss:.4f}", style="cyan")
    for answer in answers[-2:]:
        console.print(sample_table(answer))
    console.print(state.picture())
    title = "qlora-train recipes/quickstart.toml"
    return without_remote_fonts(console.export_svg(title=title, theme=DIMMED_MONOKAI, unique_id="panel"))


def until_the_middle(recorded: list[events.Event]) -> list[events.Event]:
    """The events that a screen has seen a few steps after the last answers before two thirds of the run."""
    steps = max(event.step for event in recorded if isinstance(event, events.StepDone))
    asked = [e.step for e in recorded if isinstance(e, events.Sampled) and e.step <= SHARE * steps]
    last = (asked[-1] if asked else round(SHARE * steps)) + FURTHER
    return [event for event in recorded if getattr(event, "step", 0) <= last and not isinstance(event, events.End)]


def event_of(line: dict[str, Any]) -> events.Event:
    """The event of a line of events.jsonl; of a path only the last two parts."""
    kind = KINDS[line["event"]]
    values = {field.name: line[field.name] for field in dataclasses.fields(kind) if field.name in line}
    if "run_dir" in values:
        values["run_dir"] = "/".join(Path(values["run_dir"]).parts[-2:])
    return kind(**values)


def without_remote_fonts(svg: str) -> str:
    """rich's SVG without its @font-face rules, which would ask a server for a font."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]+;", f"font-family: {FONTS};", svg)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


if __name__ == "__main__":
    main()
