"""What a check found: a line that is green, yellow or red, with what mends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

Figure = float | int | str | bool | None


class Colour(StrEnum):
    """Green: as it should be. Yellow: it works, and something is worse than it could be. Red: it will not work."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


@dataclass(frozen=True)
class Finding:
    """`said` is one line for anybody. `mend` is the command or the step that mends it; green lines have none.

    `here` is for who sits at this machine (folders, programs, process ids), and goes into no file.
    """

    name: str
    colour: Colour
    said: str
    mend: str = ""
    here: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A check that may take `seconds` at most; `name` stands for its findings where it gives none."""

    name: str
    seconds: float
    run: Callable[[], Sequence[Finding]]


def green(name: str, said: str, here: str = "", figures: Mapping[str, Figure] | None = None) -> Finding:
    return Finding(name, Colour.GREEN, said, "", here, figures or {})


def yellow(name: str, said: str, mend: str, here: str = "", figures: Mapping[str, Figure] | None = None) -> Finding:
    return Finding(name, Colour.YELLOW, said, mend, here, figures or {})


def red(name: str, said: str, mend: str, here: str = "", figures: Mapping[str, Figure] | None = None) -> Finding:
    return Finding(name, Colour.RED, said, mend, here, figures or {})


def worst(findings: Sequence[Finding]) -> Colour:
    """The colour of the whole."""
    return max((one.colour for one in findings), key=list(Colour).index, default=Colour.GREEN)
