"""How answers were told apart, in curves and a table: accuracies, margins and divergences of a run of preference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from qlora.report.curves import Chart, Line
from qlora.report.page import Element, element, table
from qlora.report.run_events import Preference

_MOST = 50  # evaluations in the table; the curve has all


def charts(steps: Mapping[int, Preference], evaluations: Mapping[int, Preference]) -> Iterator[Chart]:
    """Accuracy and margin by step, and both rewards of what is held out; nothing of a run without pairs."""
    for title, key, shown in (("Answers told apart, %", "accuracy", 100.0), ("Margin of rewards", "margin", 1.0)):
        lines = [
            *_line("training", steps, key, shown, 0),
            *_line("evaluation", evaluations, key, shown, 1),
        ]
        if lines:
            yield Chart(title, lines, lambda value: f"{value:.3g}", may_be_log=False)
    both = (("better", "better_reward", 0), ("worse", "worse_reward", 1))
    rewards = [line for name, key, colour in both for line in _line(name, evaluations, key, 1.0, colour)]
    if rewards:  # a margin grows as well where both fall, and the worse one faster
        marked = [replace(line, noisy=False, dots=True) for line in rewards]
        yield Chart("Rewards of held-out answers", marked, lambda value: f"{value:.3g}", may_be_log=False)


def _line(name: str, found: Mapping[int, Preference], key: str, factor: float, colour: int) -> list[Line]:
    values = {step: value for step in sorted(found) if (value := getattr(found[step], key)) is not None}
    if not values:
        return []
    scaled = [factor * value for value in values.values()]
    return [Line(name, list(values), scaled, colour, noisy=colour == 0, dots=colour == 1)]


def section(evaluations: Mapping[int, Preference]) -> Iterator[Element]:
    """What each evaluation found."""
    if not evaluations:
        return
    yield element("h2", "Better and worse answers")
    heads = (
        "step",
        "compared",
        "told apart",
        "margin",
        "better reward",
        "worse reward",
        "divergence",
        "KL",
        "likelier",
    )
    rows: list[Sequence[str]] = [heads]
    for step in sorted(evaluations)[-_MOST:]:
        one = evaluations[step]
        figures = (one.margin, one.better_reward, one.worse_reward, one.divergence, one.kl)
        shown = ["" if value is None else f"{value:.4f}" for value in figures]
        likelier = "" if one.likelier is None else f"{100 * one.likelier:.1f} %"
        rows.append([f"{step:,}", f"{one.compared:,}", f"{100 * one.accuracy:.1f} %", *shown, likelier])
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]  # what its objective measures
    titles, *cells = zip(*kept, strict=True)
    yield table(titles, cells)
