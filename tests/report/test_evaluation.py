"""The table of an evaluation: as wide as a terminal, and nothing of it left out."""

from __future__ import annotations

from typing import Any

from qlora.report.evaluation import lines


def means(value: float) -> dict[str, float]:
    return {"mean": value, "low": value - 0.01, "high": value + 0.01}


def model(name: str, loss: float, answers: bool) -> dict[str, Any]:
    found: dict[str, Any] = {key: means(loss) for key in ("loss", "perplexity", "token_accuracy")}
    found |= {key: means(0.5) if answers else None for key in ("exact_match", "contains")}
    return {"name": name, "sources": {}, **found}


def figures(answers: bool) -> dict[str, Any]:
    test = {"only_one": 1, "only_other": 7, "p": 0.0703} if answers else None
    pair = {"one": "base", "other": "x" * 60, "loss_difference": means(-1.0), "beyond_chance": True}
    models = [model("base", 2.0, answers), model("x" * 60, 1.0, answers)]
    pairs = [{**pair, "exact_match": test, "contains": test}]
    return {"rows": 1200, "trained_tokens": 5, "answers": 9 * answers, "models": models, "pairs": pairs}


def test_tables_fit_a_terminal() -> None:
    found = lines(figures(True))
    assert max(map(len, found[:-4])) <= 90
    text = "\n".join(found)
    assert "1,200 rows" in text and "2.000 [1.990–2.010]" in text and "50.0 [49.0–51.0]" in text
    assert "loss -1.0000 [-1.0100 to -0.9900], beyond chance" in text
    assert "exact match: 7 right that were wrong, 1 wrong that were right, p 0.07" in text


def test_without_answers_there_is_one_table() -> None:
    text = "\n".join(lines(figures(False)))
    assert "exact match" not in text and "answered" not in text


def test_a_harness_alone_is_a_line_a_metric() -> None:
    tasks = {
        "arc": {"rows": 10, "metrics": {"acc": {"value": 0.5, "stderr": 0.1}, "em": {"value": 1.0, "stderr": None}}}
    }
    found = lines({"harness": {"base": tasks}})
    assert [line.split(None, 1)[1] for line in found] == [
        "arc: acc 0.5000 ± 0.1000   (10 rows)",
        "arc: em 1.0000   (10 rows)",
    ]
