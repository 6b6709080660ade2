"""Trackers that another trainer's configuration names, as sinks of a recipe's report."""

from __future__ import annotations

from typing import Any, get_args

from qlora.importers.draft import Draft, Rule
from qlora.recipe.sections import ReportSection
from qlora.recipe_values import SinkName

TRACKERS = "events.jsonl, the screen and report.html have the figures"
_OURS: tuple[str, ...] = ReportSection().sinks
_NAMES = tuple(name for name in get_args(SinkName) if name not in _OURS)
NAMES = "what a tracker keeps is under the names of the project and the run here"
_OFF: tuple[Any, ...] = (False, None, "", "none", "false", "no", 0, [])


def report_to(draft: Draft, key: str, value: Any) -> None:
    """A name, a list of names or a text with commas. What is no tracker of ours is named, and so is "all"."""
    found = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
    wanted = [one.strip().lower() if isinstance(one, str) else one for one in found]
    wanted = [one for one in wanted if one not in _OFF]
    if not wanted:
        draft.ours(key, f"none: {TRACKERS}")
    known = [one for one in wanted if one in _NAMES]
    for one in known:
        _track(draft, key, one)
    if others := [one for one in wanted if one not in _NAMES]:
        why = "every tracker that is installed there" if "all" in others else "no tracker that is known here"
        draft.leave(key, others[0] if len(others) == 1 else others, f"{why}: report.sinks takes {', '.join(_NAMES)}")


def switch_of(name: str) -> Rule:
    """For a key that turns one tracker on."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value in _OFF:
            draft.ours(key, f"off: {TRACKERS}")
        else:
            report_to(draft, key, name)

    return rule


def named_by(name: str) -> Rule:
    """For a key that names a project of a tracker's, which turns that on."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value in _OFF:
            draft.ours(key, "not set")
            return
        if name in _NAMES:
            _track(draft, key, name)
        draft.leave(key, value, NAMES)

    return rule


def _track(draft: Draft, key: str, name: str) -> None:
    sinks = list(draft.values.get("report.sinks", _OURS))
    if name not in sinks:
        draft.carry(key, "report.sinks", [*sinks, name], "kept on this machine")
    else:
        draft.ours(key, f"report.sinks has {name}")
