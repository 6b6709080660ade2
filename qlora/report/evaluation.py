"""Models on the same rows, as lines of text: one a model, then what differs beyond chance, then a harness's tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_WIDTH = 22  # of a model's name
# Key, title, what it is shown times, digits. Two tables: a terminal has 80 columns.
_TABLES = (
    (("loss", "loss", 1.0, 3), ("perplexity", "perplexity", 1.0, 2), ("token_accuracy", "tokens right, %", 100.0, 1)),
    (("exact_match", "exact match, %", 100.0, 1), ("contains", "contains answer, %", 100.0, 1)),
)
_COLUMN = 21


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures of an evaluation, of a harness, or of both."""
    found: list[str] = []
    if figures.get("models"):
        asked = f", {figures['answers']:,} of them answered" if figures["answers"] else ""
        found.append(f"{figures['rows']:,} rows, {figures['trained_tokens']:,} trained tokens{asked}; in brackets 95 %")
        for table in _TABLES:
            if any(model[table[0][0]] for model in figures["models"]):
                found += _table(figures["models"], table)
        found += _pairs(figures)
    for name, tasks in figures.get("harness", {}).items():
        found += _tasks(name, tasks)
    return found


def _table(models: Any, columns: Any) -> Iterator[str]:
    yield f"{'':{_WIDTH}}" + "".join(f" {title:>{_COLUMN}}" for _, title, _, _ in columns)
    for model in models:
        yield _row(model["name"], model, columns)
        yield from (_row(f"  {source}", line, columns) for source, line in model["sources"].items())


def _row(name: str, line: Mapping[str, Any], columns: Any) -> str:
    cells = [_cell(line[key], times, digits) for key, _, times, digits in columns]
    return f"{_short(name):{_WIDTH}}" + "".join(f" {cell:>{_COLUMN}}" for cell in cells)


def _cell(value: Mapping[str, float] | None, times: float, digits: int) -> str:
    if value is None:
        return "–"
    mean, low, high = (f"{times * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}–{high}]"


def _pairs(figures: Mapping[str, Any]) -> Iterator[str]:
    """Each model beside the first one of the table."""
    if len(figures["models"]) < 2:
        return
    first = figures["models"][0]["name"]
    yield f"beside {first}:"
    for pair in figures["pairs"]:
        if pair["one"] != first:
            continue
        yield f"  {pair['other']}"
        apart = pair["loss_difference"]
        told = f"loss {apart['mean']:+.4f} [{apart['low']:+.4f} to {apart['high']:+.4f}]"
        yield f"    {told}{', beyond chance' if pair['beyond_chance'] else ', within chance'}"
        for key, title in (("exact_match", "exact match"), ("contains", "contains answer")):
            if (test := pair[key]) is not None:
                only, lost = test["only_other"], test["only_one"]
                yield f"    {title}: {only} right that were wrong, {lost} wrong that were right, p {test['p']:.2g}"


def _tasks(name: str, tasks: Mapping[str, Any]) -> Iterator[str]:
    for task, found in tasks.items():
        for metric, value in found["metrics"].items():
            error = "" if value["stderr"] is None else f" ± {value['stderr']:.4f}"
            rows = "" if found["rows"] is None else f"   ({found['rows']:,} rows)"
            yield f"{_short(name):{_WIDTH}}{task}: {metric} {value['value']:.4f}{error}{rows}"


def _short(name: str) -> str:
    return name if len(name) < _WIDTH else f"{name[: _WIDTH - 2]}…"
