"""An exam on the screen and in texts: a line a column, then the controls, then what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "base": "base",
    "base_retrieval": "base + best 3 passages",
    "base_passage": "base + its own passage",
    "tuned": "tuned",
    "tuned_retrieval": "tuned + best 3 passages",
}
_HEADINGS = {
    "yours": "{} questions of yours",
    "words": "{} questions in other words, none of them trained",
}
_WIDTH = 50


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures of exam.json as lines of text, the user's own questions first."""
    found: list[str] = []
    for part, heading in _HEADINGS.items():
        if part in figures["parts"]:
            found += _part(heading.format(f"{figures['parts'][part]['questions']:,}"), figures["parts"][part])
    controls = filter(None, (_left_out(figures), _unanswerable(figures)))
    if told := "       ".join(controls):
        found.append(told)
    if (elsewhere := figures["elsewhere"])["prompts"]:
        name = f"elsewhere, {elsewhere['prompts']} prompts"
        found.append(f"{name:{_WIDTH}}{elsewhere['nats']:.2f} nats from the base")
    if told := _study(figures):
        found.append(told)
    return [*found, *figures["advice"]]


def _part(heading: str, part: Mapping[str, Any]) -> list[str]:
    found = [f"{heading:{_WIDTH}}{'right':>8}    95 %"]
    for name, column in part["columns"].items():
        right = column["right"]
        note = "    what this base can read out at all" if name == "base_passage" else ""
        other = "" if column["questions"] == part["questions"] else f"    of {column['questions']:,}"
        interval = f"{100 * right['low']:.0f}–{100 * right['high']:.0f}"
        found.append(f"{NAMES[name]:{_WIDTH}}{100 * right['mean']:6.1f} %    {interval:6}{other}{note}".rstrip())
    return found


def _left_out(figures: Mapping[str, Any]) -> str:
    part = figures["parts"].get("left_out")
    if part is None:
        return ""
    shares = ", ".join(f"{name} {_percent(column['right']['mean'])}" for name, column in part["columns"].items())
    return f"left out of the study, {part['questions']:,}: {shares}"


def _unanswerable(figures: Mapping[str, Any]) -> str:
    asked = figures["unanswerable"]
    if not asked["questions"]:
        return ""
    shares = " → ".join(_percent(asked[name]) for name in ("base", "tuned") if asked[name] is not None)
    return f"cannot be answered, {asked['questions']}: invented {shares}"


def _study(figures: Mapping[str, Any]) -> str:
    coverage, dropped = figures["coverage"], figures["dropped"]
    parts = []
    if coverage and coverage["sentences"]:
        share = _percent(coverage["with_question"] / coverage["sentences"])
        parts.append(f"coverage: {share} of {coverage['sentences']:,} sentences have a question")
    if dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        parts.append(f"{sum(dropped.values()):,} rows dropped: {reasons}")
    return "; ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
