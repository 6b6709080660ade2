"""Figures as people read them: bytes, seconds, how far a task is, and the course of a series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from qlora.events import Progress
from qlora.reward_events import Rewarded

BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
SPARK = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40
NAMED_REWARDS = 8  # in a line
NAME_SHOWN = 40  # characters of a reward's name


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in BYTE_UNITS:
        if count < 1024 or unit == BYTE_UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def how_far(task: Progress) -> str:
    """'151.9 of 256.6 MiB (59 %)', both in the total's unit; '120 of 7,000 tokens (2 %)'; '12 of 60 (20 %)'."""
    done, total = f"{task.done:,}", f"{task.total:,} {task.unit}".rstrip()
    if task.unit in ("B", "bytes"):
        total = human_bytes(task.total)
        unit = total.split()[1]
        done = f"{task.done / 1024 ** BYTE_UNITS.index(unit):.{0 if unit == 'B' else 1}f}"
    return f"{done} of {total} ({100 * task.done / max(task.total, 1):.0f} %)"


def human_seconds(seconds: float) -> str:
    """3700 -> '1 h 01 min'; 'unknown' for what is no number."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sparkline(values: list[float], width: int = SPARK_WIDTH) -> str:
    """The course of `values` in at most `width` characters: means of equal stretches, scaled to their range.

    Values that are not finite are left out.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARK[min(len(SPARK) - 1, int((m - low) / span * len(SPARK)))] for m in means)


def names_of(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart: names alone, with their folders where two have one name."""
    parts = [path.replace("\\", "/").rstrip("/").split("/") for path in paths]
    names = []
    for one in parts:
        others = [other for other in parts if other != one]
        taken = 1
        while taken < len(one) and any(other[-taken:] == one[-taken:] for other in others):
            taken += 1
        names.append("/".join(one[-taken:]))
    return names


def told_apart(accuracy: float, margin: float | None, divergence: float | None, kl: float | None) -> str:
    """Of a step or an evaluation, the figures that it has."""
    parts = [f"{accuracy:.1%} told apart"]
    if margin is not None:
        parts.append(f"margin {margin:.3f}")
    if divergence is not None:
        parts.append(f"divergence {divergence:.3f} nats an answer")
    if kl is not None:
        parts.append(f"KL to the reference {kl:.4f} nats a token")
    return " · ".join(parts)


def worth(told: Rewarded) -> str:
    """What a model's own answers were worth, in a line."""
    each = [f"{short_name(name)} {value:.3f}" for name, value in list(told.rewards.items())[:NAMED_REWARDS]]
    parts = [f"reward {told.reward:.3f}" + (f" ({', '.join(each)})" if each else "")]
    if told.kl is not None:
        parts.append(f"KL {told.kl:.4f}")
    parts.append(f"{told.tokens:.0f} tokens")
    shares = {"cut": told.cut, "groups all alike": told.without_signal, "tokens clipped": told.clipped}
    parts += [f"{share:.0%} {name}" for name, share in shares.items() if share]
    return " · ".join(parts)


def short_name(name: str) -> str:
    """Of a reward: a pattern may be long."""
    return name if len(name) <= NAME_SHOWN else f"{name[:NAME_SHOWN]}…"
