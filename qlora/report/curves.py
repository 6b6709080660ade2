"""Curves of numbers by step, as inline SVG: thinned to what a screen can show, so that no spike is lost.

Of each column of the drawing the first, the least, the largest and the last value are drawn: the same picture as all
values make, from some hundred points ("M4: A Visualization-Oriented Time Series Data Aggregation", VLDB 2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora.report.page import Element, classed, element

WIDTH, HEIGHT = 400, 210  # of a drawing, in its own units: about a pixel each on a telephone
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 10, 24
COLUMNS = 2 * (WIDTH - LEFT - RIGHT)  # twice as fine as the units, for screens that are
COLOURS = 8  # line styles of the page's style, c0 to c7; later lines are dashed
LARGEST = 1e30  # beyond it a number is taken for none: no quantity of a run comes near, and its square is still finite
SMALLEST = 1e-300  # below it a number is taken for 0: a fifth of so narrow a range may be no number above 0
_MEANS = 120  # points of a smoothed line
_FAR = 30.0  # largest value over median, beyond which an axis is logarithmic

Point = tuple[float, float]
Attributes = dict[str, str | int | float]


@dataclass(frozen=True)
class Line:
    """One curve: `steps` rise; `values` may hold what is not finite, which is left open and marked.

    `noisy` lines are drawn faint, with their means in front. `dots`: each value by itself, with its number on it.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    noisy: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines that share their axes. `shown` writes a value; `limits` are values with a name, drawn across.

    `breaks` are steps at which another process went on.
    """

    title: str
    lines: Sequence[Line]
    shown: Callable[[float], str]
    limits: Sequence[tuple[str, float]] = ()
    breaks: Sequence[float] = ()
    may_be_log: bool = True


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` to places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.is_log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)


def is_number(value: float) -> bool:
    """Whether a value can be drawn."""
    return -LARGEST < value < LARGEST  # which NaN is not


def draw(chart: Chart) -> Element:
    """The chart with its title, its legend where it has several lines, and what could not be drawn."""
    values = [value for line in chart.lines for value in line.values if is_number(value)]
    if not values:
        words = "no number to be drawn" if any(len(line.values) for line in chart.lines) else "nothing yet"
        return classed("div", "chart", element("h3", chart.title), classed("p", "dim", words))
    steps = [line.steps[at] for line in chart.lines if len(line.steps) for at in (0, -1)]
    across = Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    up = _value_scale(values, [value for _, value in chart.limits], chart.may_be_log)
    drawn = [*_grid(up, across, chart.shown), *_breaks(chart.breaks, across), *_limits(chart, up)]
    for line in chart.lines:
        drawn += _line(line, across, up, chart.shown)
    size = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": _words(chart)}
    return classed("div", "chart", element("h3", chart.title), element("svg", *drawn, attributes=size), *_legend(chart))


def thinned(line: Line, first: float, last: float, columns: int = COLUMNS) -> Iterator[list[Point]]:
    """Stretches of a line's points: of each of `columns` columns the first, least, largest and last one.

    A value that is not finite ends a stretch.
    """
    span = (last - first) or 1.0
    stretch: list[Point] = []
    column, held = -1, [(0.0, 0.0)] * 4  # first, least, largest, last of the column
    for point in zip(line.steps, line.values, strict=True):
        value = point[1]
        at = int((point[0] - first) / span * columns)
        if (at != column or not is_number(value)) and column >= 0:
            stretch += sorted(set(held))
            column = -1
        if not is_number(value):
            if stretch:
                yield stretch
            stretch = []
        elif column < 0:
            column, held = at, [point] * 4
        else:
            held[3] = point
            if value < held[1][1]:
                held[1] = point
            elif value > held[2][1]:
                held[2] = point
    if column >= 0:
        stretch += sorted(set(held))
    if stretch:
        yield stretch


def smoothed(line: Line, most: int = _MEANS) -> Line | None:
    """Means of equal numbers of a line's values; None where there are too few to need it."""
    pairs = [pair for pair in zip(line.steps, line.values, strict=True) if is_number(pair[1])]
    if len(pairs) < 3 * most:
        return None
    edges = [round(at * len(pairs) / most) for at in range(most + 1)]
    parts = [pairs[start:end] for start, end in pairwise(edges)]
    steps, values = ([sum(pair[of] for pair in part) / len(part) for part in parts] for of in (0, 1))
    return Line(line.name, steps, values, line.colour)


def legend(lines: Sequence[tuple[str, int]]) -> Element:
    """Names of lines with their colours."""
    return classed("p", "legend", *(classed("span", f"key swatch {style(colour)}", name) for name, colour in lines))


def style(colour: int) -> str:
    """The classes of a line: its colour, and a dash where the colours are used up."""
    return f"c{colour % COLOURS} d{colour // COLOURS % 3}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values within a range: steps of 1, 2 or 5 times a power of ten, at most `most` + 1 of them."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [first * step + at * step for at in range(most + 2) if first * step + at * step <= high + step * 1e-6]


def _value_scale(values: Sequence[float], limits: Sequence[float], may_be_log: bool) -> Scale:
    """From what is drawn to the height; logarithmic where a few values would press the others flat."""
    values, limits = ([0.0 if abs(value) < SMALLEST else value for value in some] for some in (values, limits))
    low, high = min(*values, *limits, values[0]), max(*values, *limits, values[0])
    middle = sorted(values)[len(values) // 2]
    if may_be_log and low > 0 and high > _FAR * middle:
        return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, is_log=True)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    bottom = 0.0 if 0 <= low < 0.35 * high else low - room
    return Scale(bottom, high + room, HEIGHT - BOTTOM, TOP)


def _value_ticks(scale: Scale) -> list[float]:
    if not scale.is_log:
        return ticks(scale.low, scale.high)
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    every = max(1, len(powers) // 6)
    fine = (1, 3) if len(powers) < 5 else (1,)
    marks = [10.0**power * times for power in powers[::every] for times in fine]
    return [mark for mark in marks if scale.low <= mark <= scale.high]


def _grid(up: Scale, across: Scale, shown: Callable[[float], str]) -> Iterator[Element]:
    for value in _value_ticks(up):
        y = _figure(up.place(value))
        yield element("line", attributes={"class": "axis", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y})
        place: Attributes = {"x": LEFT - 6, "y": _figure(up.place(value) + 4), "text-anchor": "end"}
        yield element("text", shown(value), attributes=place)
    marks = sorted({round(step) for step in ticks(across.low, across.high, 4)})
    for step in marks:
        if across.low <= step <= across.high:
            x = across.place(step)
            anchor = "middle" if x < WIDTH - 30 else "end"
            at: Attributes = {"x": _figure(min(x, WIDTH - RIGHT)), "y": HEIGHT - 7, "text-anchor": anchor}
            yield element("text", f"{step:,}", attributes=at)


def _breaks(steps: Sequence[float], across: Scale) -> Iterator[Element]:
    """Where another process went on; one mark a unit, however many there are."""
    for x in sorted({round(across.place(step)) for step in steps if across.low <= step <= across.high}):
        yield element("line", attributes={"class": "break", "x1": x, "x2": x, "y1": TOP, "y2": HEIGHT - BOTTOM})


def _limits(chart: Chart, up: Scale) -> Iterator[Element]:
    for name, value in chart.limits:
        y = up.place(value)
        ends: Attributes = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": _figure(y), "y2": _figure(y)}
        yield element("line", attributes={"class": "limit", **ends})
        said = f"{name} {chart.shown(value)}"
        yield element("text", said, attributes={"x": LEFT + 4, "y": _figure(y + 12 if y < TOP + 14 else y - 4)})


def _line(line: Line, across: Scale, up: Scale, shown: Callable[[float], str]) -> Iterator[Element]:
    means = smoothed(line) if line.noisy else None
    for of, kind in ((line, "raw" if means else "line"), (means, "line")):
        if of is not None:
            for stretch in thinned(of, across.low, across.high):
                yield _stretch(stretch, f"{kind} {style(of.colour)}", across, up)
    if line.dots:
        for stretch in thinned(line, across.low, across.high, 60):
            for step, value in stretch:
                words = element("title", f"step {step:,.0f}: {shown(value)}")
                place: Attributes = {"cx": _figure(across.place(step)), "cy": _figure(up.place(value)), "r": 2.4}
                yield element("circle", words, attributes={"class": f"dot {style(line.colour)}", **place})
    pairs = zip(line.steps, line.values, strict=True)
    for x in sorted({round(across.place(step)) for step, value in pairs if not is_number(value)}):
        ends = {"x1": x, "x2": x, "y1": HEIGHT - BOTTOM - 8, "y2": HEIGHT - BOTTOM}
        yield element("line", attributes={"class": "gone", **ends})


def _stretch(points: Sequence[Point], classes: str, across: Scale, up: Scale) -> Element:
    if len(points) == 1:
        place: Attributes = {"cx": _figure(across.place(points[0][0])), "cy": _figure(up.place(points[0][1])), "r": 1.5}
        return element("circle", attributes={"class": f"dot {classes}", **place})
    drawn = " ".join(f"{_figure(across.place(step))},{_figure(up.place(value))}" for step, value in points)
    return element("polyline", attributes={"class": classes, "points": drawn})


def _legend(chart: Chart) -> Iterator[Element]:
    if len(chart.lines) > 1:
        yield legend([(line.name, line.colour) for line in chart.lines])
    gone = sum(not is_number(value) for line in chart.lines for value in line.values)
    if gone:
        yield classed("p", "dim", f"{gone:,} values are no finite numbers: marked in red at the foot")


def _words(chart: Chart) -> str:
    """What the picture shows, for whoever hears it."""
    told = []
    for line in chart.lines:
        known = [value for value in line.values if is_number(value)]
        if known:
            told.append(f"{line.name} from {chart.shown(known[0])} to {chart.shown(known[-1])}")
    return f"{chart.title}: {'; '.join(told)}"[:1000]


def _figure(place: float) -> str:
    """A place in the drawing, to a tenth of a unit."""
    return f"{place:.1f}".removesuffix(".0")
