"""Lines and the colour of the whole."""

from __future__ import annotations

from qlora.doctor.finding import Colour, green, red, worst, yellow


def test_the_worst_line_is_the_colour_of_the_whole() -> None:
    assert worst([]) == Colour.GREEN
    assert worst([green("a", "b"), yellow("a", "b", "c")]) == Colour.YELLOW
    assert worst([red("a", "b", "c"), yellow("a", "b", "c"), green("a", "b")]) == Colour.RED
