"""Where the peak of a run stands, drawn: a column a layer, up and down, in parts that lie on each other.

Each part has a letter of its own as well as a colour, so that a pipe and a screen without colours show the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from qlora.units import GIB, gib

HEIGHT = 16
LEFT = 11  # columns of a line before the picture: "12.34 GiB ┤"
NARROWEST = 24
UNROLLED = ("forward", "backward")


@dataclass(frozen=True)
class Part:
    """What is drawn as one: its name, its letter and colour, and the categories that it is made of."""

    name: str
    letter: str
    style: str
    categories: tuple[str, ...]


# From the bottom to the top: what is always there first.
PARTS = (
    Part("base", "█", "blue", ("weights",)),
    Part("driver, gaps", "▒", "bright_black", ("context", "workspace")),
    Part("trained", "▓", "magenta", ("adapters", "gradients", "optimizer")),
    Part("kept for the way back", "░", "green", ("activations",)),
    Part("logits", "+", "red", ("logits",)),
)


@dataclass(frozen=True)
class _Column:
    """Of one moment, or of the highest of several neighbours where a screen is narrow."""

    moment: Mapping[str, Any]
    is_peak: bool


def explained_view(explained: Mapping[str, Any], limit_bytes: int) -> RenderableType:
    """`explained` is what `--json` prints under that name."""
    peak = explained["moments"][explained["peak_at"]]
    place = f"{_name(peak)}: {gib(_total(peak))}"
    parts: list[RenderableType] = [
        Text(f"the peak stands in the {place}", style="bold"),
        Text(""),
        _Picture(explained, limit_bytes),
    ]
    parts += [Text(""), _table(explained), Text("")]
    if explained["changes"]:
        parts += [Text("what one change would do at the peak, its margin included", style="bold"), _changes(explained)]
    return Group(*parts)


@dataclass(frozen=True)
class _Picture:
    """Drawn as wide as there is room for."""

    explained: Mapping[str, Any]
    limit_bytes: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = _columns(self.explained, max(NARROWEST, options.max_width - LEFT - 1))
        most = max(self.limit_bytes, *(_total(column.moment) for column in columns))
        a_line = most / HEIGHT
        yield _over(columns, HEIGHT - round(max(_total(one.moment) for one in columns) / a_line))
        limit_at = min(HEIGHT - 1, int(self.limit_bytes / a_line))
        for line in reversed(range(HEIGHT)):
            middle = (line + 0.5) * a_line
            label = f"{gib(self.limit_bytes):>10}" if line == limit_at else f"{middle / GIB:>6.2f}    "
            text = Text(f"{label}┤" if line == limit_at else f"{label}│", style="dim")
            for column in columns:
                part = _part_at(column.moment, middle)
                empty = ("─", "dim") if line == limit_at else (" ", "")
                text.append(*((part.letter, part.style) if part is not None else empty))
            if line == limit_at:
                text.append(" limit", style="dim") if options.max_width >= LEFT + len(columns) + 6 else None
            yield text
        yield _axis(columns)
        legend = Text(" " * LEFT)
        for part in PARTS:
            legend.append(part.letter, style=part.style).append(f" {part.name}   ")
        yield legend


def _over(columns: Sequence[_Column], lines: int) -> Text:
    """Above the picture, where the peak is: with a letter, for screens without colours too."""
    at = next(place for place, column in enumerate(columns) if column.is_peak)
    return Text(" " * (LEFT + at) + "▼ peak" if at < len(columns) - 8 else f"{'peak ▼':>{LEFT + at + 1}}", style="bold")


def _axis(columns: Sequence[_Column]) -> Text:
    """Names of the passes under their columns; what has one column has a number, told behind."""
    line, single = Text(" " * LEFT), []
    for phase, several in groupby(columns, key=lambda column: column.moment["phase"]):
        width = len(list(several))
        if phase in UNROLLED and width > 4:
            line.append(f"{f' {phase} ':─^{width}}"[:width], style="dim")
        else:
            single.append(phase)
            line.append(f"{len(single)}" * width)
    return line.append("\n" + " " * LEFT + " · ".join(f"{at} {name}" for at, name in enumerate(single, 1)), style="dim")


def _columns(explained: Mapping[str, Any], room: int) -> list[_Column]:
    moments, peak = explained["moments"], explained["peak_at"]
    alone = sum(moment["layer"] is None for moment in moments)
    together = 1
    while alone + _count(moments, together) > room:
        together += 1
    columns = []
    for unrolled, several in groupby(
        enumerate(moments), key=lambda one: one[1]["layer"] is not None and one[1]["phase"]
    ):
        inside = list(several)
        step = together if unrolled else 1
        for at in range(0, len(inside), step):
            place, moment = max(inside[at : at + step], key=lambda one: _total(one[1]))
            columns.append(_Column(moment, place == peak))
    return columns


def _count(moments: Sequence[Mapping[str, Any]], together: int) -> int:
    of_phase = [
        sum(moment["phase"] == phase and moment["layer"] is not None for moment in moments) for phase in UNROLLED
    ]
    return sum(-(-count // together) for count in of_phase)


def _part_at(moment: Mapping[str, Any], height: float) -> Part | None:
    over = 0
    for part in PARTS:
        over += _of(moment, part)
        if height <= over:
            return part
    return None


def _table(explained: Mapping[str, Any]) -> Table:
    """Each phase at its highest."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for _ in range(len(PARTS) + 1):
        table.add_column(justify="right", no_wrap=True)
    heads = ("GiB", *(part.name.partition(",")[0].partition(" for")[0] for part in PARTS), "all")
    table.add_row(*(Text(head, style="dim") for head in heads))
    moments, peak = explained["moments"], explained["moments"][explained["peak_at"]]
    for _, several in groupby(moments, key=lambda moment: moment["phase"]):
        highest = max(several, key=_total)
        style = "bold" if highest is peak else ""
        cells = [*(_of(highest, part) for part in PARTS), _total(highest)]
        table.add_row(Text(_name(highest), style=style), *(Text(f"{cell / GIB:.2f}", style=style) for cell in cells))
    return table


def _changes(explained: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    for change in explained["changes"]:
        saved, speed = change["saved_bytes"], change["tokens_per_second"]
        said = f"{gib(abs(saved))} {'less' if saved >= 0 else 'more'}"
        fits = Text("fits", style="green") if change["fits"] else Text("does not fit", style="red")
        table.add_row(said, Text(", ".join(change["lines"])), Text(f"{speed:,.0f} tokens/s" if speed else ""), fits)
    return table


def _name(moment: Mapping[str, Any]) -> str:
    layer = moment["layer"]
    return str(moment["phase"]) if layer is None else f"{moment['phase']}, layer {layer}"


def _of(moment: Mapping[str, Any], part: Part) -> int:
    return sum(moment["bytes"].get(category, 0) for category in part.categories)


def _total(moment: Mapping[str, Any]) -> int:
    return sum(moment["bytes"].values())
