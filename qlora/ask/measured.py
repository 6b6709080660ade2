"""What models made of the same rows, as figures: means with intervals, by source, and each pair compared.

Intervals and tests are those of `study/ratios.py` and `study/metrics.py`; an answer is exact as a run's exact match has
it, and contains the row's own as an exam has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora.ask.likelihood import Asked, RowScores
from qlora.data.documents.language import language_of
from qlora.rewards.compare import same_answer, without_thoughts
from qlora.study import metrics, ratios
from qlora.study.words import LANGUAGES

MOST_SOURCES = 50


@dataclass
class Measured:
    """One line of the table: what a model made of the rows, and its answers."""

    name: str
    kind: str
    by: str
    scores: RowScores
    answers: list[str] = field(default_factory=list)


def figures_of(measured: Sequence[Measured], asked: Asked) -> dict[str, Any]:
    """The table as plain values: models, by source, and each pair of models compared."""
    split, expected = asked.split, [question.expected for question in asked.questions]
    language = _language(expected)
    of_rows = [Path(where.rpartition(":")[0]).name for where in split.wheres]
    right = {one.name: _right(one.answers, expected, language) for one in measured}
    sources = list(dict.fromkeys(of_rows))[:MOST_SOURCES]
    lines = []
    for one in measured:
        line = {"name": one.name, "kind": one.kind, "by": one.by, **_line(one, right[one.name], None, None)}
        line["sources"] = {}
        for source in sources if len(sources) > 1 else ():
            rows = [row for row, name in enumerate(of_rows) if name == source]
            questions = [number for number, row in enumerate(asked.answered) if of_rows[row] == source]
            line["sources"][source] = {"rows": len(rows), **_line(one, right[one.name], rows, questions)}
        lines.append(line)
    return {
        "rows": len(split.lengths),
        "trained_tokens": sum(split.trained),
        "answers": len(expected),
        "max_new_tokens": asked.max_new_tokens if expected else 0,
        "sources": sources,
        "confidence": metrics.CONFIDENCE,
        "models": lines,
        "pairs": [_pair(one, other, right) for number, one in enumerate(measured) for other in measured[number + 1 :]],
    }


def _language(expected: Sequence[str]) -> str:
    found = language_of("\n".join(expected))
    return found if found in LANGUAGES else "en"


def _right(answers: Sequence[str], expected: Sequence[str], language: str) -> dict[str, list[bool]]:
    """Of each answer, whether it is the row's own, and whether that stands in it."""
    pairs = list(zip(answers, expected, strict=True))
    return {
        "exact_match": [same_answer(given, wanted) for given, wanted in pairs],
        "contains": [
            metrics.contains(without_thoughts(wanted), without_thoughts(given), language) for given, wanted in pairs
        ],
    }


def _line(
    one: Measured, right: Mapping[str, Sequence[bool]], rows: Sequence[int] | None, questions: Sequence[int] | None
) -> dict[str, Any]:
    """Means with intervals, over all rows and questions or some of them."""
    chosen = range(len(one.scores.nats)) if rows is None else rows
    nats, hits, weights = ([values[row] for row in chosen] for values in _columns(one.scores))
    loss = ratios.ratio(nats, weights, seed=0)
    accuracy = ratios.ratio(hits, weights, seed=0)
    if accuracy.low == accuracy.high:  # drawing equal rows again shows no spread
        accuracy = metrics.bootstrap([hit / weight for hit, weight in zip(hits, weights, strict=True)], seed=0)
    shown: dict[str, Any] = {
        "loss": asdict(loss),
        "perplexity": {key: math.exp(min(value, 700.0)) for key, value in asdict(loss).items()},
        "token_accuracy": asdict(accuracy),
    }
    for key, values in right.items():
        some = list(values) if questions is None else [values[number] for number in questions]
        shown[key] = asdict(metrics.bootstrap([float(value) for value in some], seed=0)) if some else None
    return shown


def _columns(scores: RowScores) -> tuple[list[float], list[float], list[float]]:
    return scores.nats, scores.hits, scores.weights


def _pair(one: Measured, other: Measured, right: Mapping[str, Mapping[str, Sequence[bool]]]) -> dict[str, Any]:
    """How `other` differs from `one` on the same rows: loss by a paired bootstrap, answers by McNemar's test."""
    apart = ratios.difference(other.scores.nats, one.scores.nats, one.scores.weights, seed=0)
    found: dict[str, Any] = {
        "one": one.name,
        "other": other.name,
        "loss_difference": asdict(apart),
        "beyond_chance": apart.low > 0 or apart.high < 0,
    }
    for key in ("exact_match", "contains"):
        a, b = right[one.name][key], right[other.name][key]
        pairs = list(zip(a, b, strict=True))
        only = {"only_one": sum(x and not y for x, y in pairs), "only_other": sum(y and not x for x, y in pairs)}
        found[key] = {**only, "p": metrics.mcnemar(a, b)} if pairs else None
    return found
