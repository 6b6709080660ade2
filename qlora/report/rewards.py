"""What a model's own answers were worth, in curves and a table: rewards, divergences and lengths of a GRPO run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qlora.report.curves import Chart, Line
from qlora.report.figures import short_name
from qlora.report.page import Element, element, table
from qlora.report.run_events import Rewards

_MOST = 50  # evaluations in the table; the curve has all
_NAMES = 8  # of rewards, in the table


def charts(steps: Mapping[int, Rewards], evaluations: Mapping[int, Rewards]) -> Iterator[Chart]:
    """By step; nothing of a run without rewards."""
    for title, key, factor in (
        ("Mean reward", "reward", 1.0),
        ("KL from the model as it was, nats a token", "kl", 1.0),
        ("Tokens of an answer", "tokens", 1.0),
        ("Groups without a signal, %", "without_signal", 100.0),
    ):
        lines = [*_line("training", steps, key, factor, 0), *_line("evaluation", evaluations, key, factor, 1)]
        if lines:
            yield Chart(title, lines, lambda value: f"{value:.3g}", may_be_log=False)


def _line(name: str, found: Mapping[int, Rewards], key: str, factor: float, colour: int) -> Iterator[Line]:
    values = [(step, factor * value) for step in sorted(found) if (value := getattr(found[step], key)) is not None]
    if values:
        steps, scaled = zip(*values, strict=True)
        yield Line(name, list(steps), list(scaled), colour, noisy=colour == 0, dots=colour == 1)


def section(evaluations: Mapping[int, Rewards]) -> Iterator[Element]:
    """What each evaluation found."""
    if not evaluations:
        return
    yield element("h2", "What greedy answers to the evaluation rows are worth")
    shown = sorted(evaluations)[-_MOST:]
    names = list(dict.fromkeys(name for step in shown for name in evaluations[step].rewards))[:_NAMES]
    rows: list[Sequence[str]] = []
    for step in shown:
        one = evaluations[step]
        of_names = (one.rewards.get(name) for name in names)
        each = ["" if value is None else f"{value:.4f}" for value in of_names]
        rows.append(
            [f"{step:,}", f"{one.answers:,}", f"{one.reward:.4f}", *each, f"{one.tokens:.1f}", f"{one.cut:.1%}"]
        )
    heads = ("step", "answers", "reward", *map(short_name, names), "tokens", "cut")
    yield table(heads, rows)
