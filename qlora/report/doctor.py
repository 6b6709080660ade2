"""A doctor's lines: coloured on a terminal, one plain line a finding anywhere else; and the table of caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich import box
from rich.table import Column, Table
from rich.text import Text

from qlora import shown
from qlora.redaction import redact
from qlora.report.console import Terminal
from qlora.report.figures import human_bytes

WORDS = {"green": ("ok", "green"), "yellow": ("warning", "yellow"), "red": ("error", "bold red")}
NAME_COLUMNS = 16


class Line(Protocol):
    """What is drawn of a finding."""

    @property
    def name(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def said(self) -> str: ...
    @property
    def mend(self) -> str: ...
    @property
    def here(self) -> str: ...


def draw(line: Line, console: Terminal) -> None:
    """A line, and under it what mends it. On a terminal texts wrap in a column of their own, elsewhere not."""
    word, style = WORDS[str(line.colour)]
    said = redact(f"{line.said} ({line.here})" if line.here else line.said)
    mend = redact(line.mend)
    if not console.is_terminal:
        console.print(Text(f"{word:8}{line.name:{NAME_COLUMNS}} {said}"), soft_wrap=True)
        if mend:
            console.print(Text(f"{'':8}{'':{NAME_COLUMNS}} > {mend}"), soft_wrap=True)
        return
    table = Table.grid(Column(width=8), Column(width=NAME_COLUMNS + 1), Column(ratio=1, overflow="fold"), expand=True)
    table.add_row(Text(word, style=style), Text(line.name), Text(said))
    if mend:
        table.add_row("", "", Text(f"→ {mend}", style="bold"))
    console.print(table)


def verdict(count: Mapping[str, int]) -> Text:
    """The last line: how many of each colour, and what that means."""
    told = ", ".join(
        f"{count[colour]} {word}{'s' if colour != 'green' and count[colour] > 1 else ''}"
        for colour, (word, _) in WORDS.items()
        if count[colour]
    )
    means = "training works here" if not count["red"] else "mend the errors first"
    return Text(f"{told}: {means}", style=WORDS["red" if count["red"] else "green"][1])


class Entry(Protocol):
    """What is drawn of something that was kept."""

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> Any: ...
    @property
    def bytes(self) -> int: ...
    @property
    def said(self) -> str: ...
    @property
    def stays(self) -> str: ...


def draw_caches(entries: Sequence[Entry], console: Terminal) -> None:
    """Each entry with its size, and why it would stay; the largest first within its kind. Lines, or a table."""
    rows = [
        (entry.kind, human_bytes(entry.bytes), redact(f"{entry.path}: {entry.said}{_stays(entry)}"))
        for entry in sorted(entries, key=lambda one: (one.kind, -one.bytes, str(one.path)))
    ]
    if not rows:
        console.print(Text("no caches, and nothing was set aside"))
    elif not console.is_terminal:
        for kind, size, what in rows:
            console.print(Text(f"{kind:12}{size:>10}  {shown.one_line(what)}"), soft_wrap=True)
    else:
        columns = (
            Column("kind", no_wrap=True),
            Column("size", justify="right", no_wrap=True),
            Column("what", ratio=1, overflow="fold"),
        )
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(shown.one_line(text)) for text in row))
        console.print(table)


def _stays(entry: Entry) -> str:
    return f" (stays: {entry.stays})" if entry.stays else ""
