"""What a run with documents has before it, in a line each: hours, and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.units import GIB, MIB, gib

_PHASES = ("study", "exam", "train")


def lines(ahead: Mapping[str, Any] | None) -> list[str]:
    """`ahead`: `hours` and `memory` as `qlora.hours` gives them, each None where it is not known."""
    if ahead is None:
        return []
    hours, memory = ahead["hours"], ahead["memory"]
    return ([hours_line(hours)] if hours else []) + ([memory_line(memory)] if memory else [])


def hours_line(hours: Mapping[str, Any]) -> str:
    """The middle of what is likely, the range, and its parts."""
    parts = {name: hours[name] for name in ("study", "exam", "training")}
    least, most = (sum(part[end] for part in parts.values()) for end in (0, 1))
    middle = math.sqrt(max(least, 1.0) * max(most, 1.0))
    said = ", ".join(f"{name} {_range(part)}" for name, part in parts.items() if part[1])
    limited = ", where study.max_minutes ends it" if hours["limited"] else ""
    return f"time to come: about {_lasts(middle)} {hours['where']} ({_range((least, most))}): {said}{limited}"


def memory_line(memory: Mapping[str, Any]) -> str:
    """The peak, the limit, and the phases that documents bring beside training."""
    phases = ", ".join(f"{name} {_size(memory['phases'][name])}" for name in _PHASES if name in memory["phases"])
    fits = "" if memory["fits"] else ", which does not fit"
    limit = f"of {_size(memory['limit_bytes'])} ({memory['limit_source']})"
    return f"memory to come: {_size(memory['peak_bytes'])} at its peak{fits} {limit}: {phases}"


def _range(part: Sequence[float]) -> str:
    least, most = map(_lasts, part)
    return least if least == most else f"{least} to {most}"


def _lasts(seconds: float) -> str:
    """A length of time as far as it can be known: no seconds beside minutes, no minutes beside days."""
    if seconds < 55:
        return f"{max(1, round(seconds, -1 if seconds >= 10 else None)):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes < 600 and minutes % 60 else "")
    return f"{round(minutes / 1440)} days"


def _size(count: float) -> str:
    return gib(count) if count >= GIB else f"{count / MIB:.0f} MiB"
