"""Curves: thinned without losing a spike, and whole where numbers are none."""

from __future__ import annotations

import math
import random
import re

import pytest

from qlora.report.curves import COLUMNS, Chart, Line, Scale, draw, smoothed, style, thinned, ticks
from qlora.report.page import Element, page
from tests.report.pages import judged

NAN, INFINITE = float("nan"), float("inf")


def html(element: Element) -> str:
    out: list[str] = []
    element.write(out)
    return "".join(out)


def test_no_spike_is_lost_and_no_point_made_up() -> None:
    rng = random.Random(0)
    steps, values = list(range(1, 20_001)), [rng.random() for _ in range(20_000)]
    for at in (7, 9_999, 19_998):
        values[at] = 50.0 + at
        values[at - 3] = -50.0 - at
    (points,) = thinned(Line("loss", steps, values), 1, 20_000)
    assert len(points) <= 4 * (COLUMNS + 1) and points == sorted(points)
    assert set(points) <= set(zip(steps, values, strict=True))
    assert {(at + 1, values[at]) for at in (7, 4, 9_999, 9_996, 19_998, 19_995)} <= set(points)
    assert points[0][0] == 1 and points[-1][0] == 20_000


def test_few_points_are_all_drawn() -> None:
    assert list(thinned(Line("a", [1, 2, 3], [5.0, 4.0, 6.0]), 1, 3)) == [[(1, 5.0), (2, 4.0), (3, 6.0)]]
    assert list(thinned(Line("a", [4], [5.0]), 4, 4)) == [[(4, 5.0)]] and not list(thinned(Line("a", [], []), 0, 1))


def test_what_is_no_number_leaves_a_gap_and_is_counted() -> None:
    line = Line("loss", [1, 2, 3, 4, 5, 6], [1.0, NAN, 2.0, INFINITE, -1e300, 3.0])
    assert [len(stretch) for stretch in thinned(line, 1, 6)] == [1, 1, 1]
    drawn = html(draw(Chart("Loss", [line], str)))
    assert "3 values are no finite numbers" in drawn and drawn.count('class="gone"') == 3
    assert not re.search(r"[\"' ,](nan|inf)", drawn)
    assert "no number to be drawn" in html(draw(Chart("Loss", [Line("loss", [1], [NAN])], str)))
    assert "nothing yet" in html(draw(Chart("Loss", [Line("loss", [], [])], str)))


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1e-300, 1e29], [-1e29, 1e29], [5.0], [1.0, 1.0, 1.0, 900.0], [-3.0, -2.0], [5e-324, 1.0]]
)
def test_any_range_stays_inside_the_drawing(values: list[float]) -> None:
    drawn = page("t", draw(Chart("x", [Line("a", range(len(values)), values)], "{:.3g}".format, [("limit", 2.0)])))
    judged(drawn)
    for points in re.findall(r'points="([^"]+)"', drawn):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 400 and 0 <= y <= 210


def test_one_large_value_makes_the_axis_logarithmic() -> None:
    flat = [1.0 + at % 5 / 10 for at in range(100)]
    plain = html(draw(Chart("x", [Line("a", range(100), flat)], "{:g}".format)))
    steep = html(draw(Chart("x", [Line("a", range(100), [*flat[:-1], 1_000.0])], "{:g}".format)))
    assert ">1000<" not in plain and ">1000<" in steep and ">10<" in steep


def test_means_keep_the_course() -> None:
    assert smoothed(Line("a", range(100), [1.0] * 100)) is None
    means = smoothed(Line("a", range(1200), [float(at % 2) for at in range(1200)]))
    assert means is not None and set(means.values) == {0.5} and len(means.steps) == 120


def test_ticks_are_round() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0.001, 0.0042) == pytest.approx([0.001, 0.002, 0.003, 0.004])
    assert ticks(3, 3) == [3] and len(ticks(1, 20_000, 4)) <= 6


def test_places_rise_with_values() -> None:
    assert Scale(0, 10, 0, 100).place(5) == 50 and Scale(1, 100, 0, 100, is_log=True).place(10) == 50
    assert math.isfinite(Scale(1, 1, 0, 100).place(1))
    assert style(0) != style(8) != style(16)


@pytest.mark.parametrize("value", [5e-323, 5e-324, -5e-323, 1e-310])
def test_what_is_almost_nothing_is_drawn_as_nothing(value: float) -> None:
    drawn = html(draw(Chart("Loss", [Line("loss", [1, 2], [value, value])], str, [("limit", value)])))
    assert "polyline" in drawn and "nan" not in drawn
