"""What happened when: a lane for each kind of thing over the hours that a run has worked, as inline SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora.report.curves import ticks
from qlora.report.figures import human_seconds
from qlora.report.page import Element, classed, element
from qlora.report.run_files import without_places
from qlora.report.run_log import Mark, Process

WIDTH, LEFT, RIGHT, LANE, TOP = 400, 74, 10, 20, 6
LANES = ("evaluated", "saved", "recovered", "notices", "exported", "examined", "ended")
_UNITS = (1.0, 60.0, 3600.0, 86400.0)


def draw(processes: Sequence[Process], marks: Sequence[Mark], until: float) -> Element:
    """Processes as bars, and below them each kind of mark in its lane; `until` is in seconds of work."""
    processes = processes or [Process(0.0, 0, 0.0)]  # of a file that has lost its beginning
    used = [lane for lane in LANES if any(mark.kind == lane for mark in marks)]
    bottom = TOP + LANE * (len(used) + 1)
    drawn = [*_axis(until, bottom), *_bars(processes, until)]
    for number, lane in enumerate(used, 1):
        drawn += _lane(lane, [mark for mark in marks if mark.kind == lane], TOP + LANE * number, until)
    size = {"viewBox": f"0 0 {WIDTH} {bottom + 22}", "role": "img", "aria-label": "what happened when"}
    return classed("div", "narrow", element("svg", *drawn, attributes=size))


def _place(at: float, until: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(max(at / until if until > 0 else 0.0, 0.0), 1.0)


def _axis(until: float, bottom: float) -> Iterator[Element]:
    unit = max((one for one in _UNITS if one <= max(until, 1.0)), default=1.0)
    for value in ticks(0.0, max(until, 1.0) / unit, 4):
        x = round(_place(value * unit, max(until, 1.0)), 1)
        yield element("line", attributes={"class": "axis", "x1": x, "x2": x, "y1": TOP, "y2": bottom})
        anchor = "middle" if x < WIDTH - 30 else "end"
        yield element("text", _time(value, unit), attributes={"x": x, "y": bottom + 14, "text-anchor": anchor})


def _time(value: float, unit: float) -> str:
    name = {1.0: "s", 60.0: "min", 3600.0: "h", 86400.0: "d"}[unit]
    return f"{value:g} {name}"


def _bars(processes: Sequence[Process], until: float) -> Iterator[Element]:
    yield _name("ran", TOP)
    ends = [process.at for process in processes[1:]] + [until]
    for process, end in zip(processes, ends, strict=True):
        start, width = _place(process.at, until), max(_place(end, until) - _place(process.at, until) - 1, 1.0)
        said = f"{human_seconds(end - process.at)} of work"
        if process.step:
            said = f"went on after step {process.step:,}: {said}"
        if process.pause:
            said += f"; nothing ran for {human_seconds(process.pause)} before"
        place = {"x": round(start, 1), "y": TOP + 4, "width": round(width, 1), "height": LANE - 8}
        yield element("rect", element("title", said), attributes={"class": "bar", **place})


def _name(lane: str, y: float) -> Element:
    return element("text", lane, attributes={"x": LEFT - 8, "y": y + 14, "text-anchor": "end"})


def _lane(lane: str, marks: Sequence[Mark], y: float, until: float) -> Iterator[Element]:
    """One mark a unit of the drawing, with what it stands for on it."""
    yield _name(lane, y)
    places: dict[int, list[Mark]] = {}
    for mark in marks:
        places.setdefault(round(_place(mark.at, until)), []).append(mark)
    for x, here in places.items():
        more = f" (and {len(here) - 1:,} more)" if len(here) > 1 else ""
        words = element("title", f"{human_seconds(here[0].at)}: {without_places(here[0].text)}{more}")
        yield element("line", words, attributes={"class": f"mark {lane}", "x1": x, "x2": x, "y1": y + 3, "y2": y + 17})
