"""Figures of an exam, for tests of what is drawn."""

from __future__ import annotations

from typing import Any


def column(asked: int, mean: float, low: float, high: float) -> dict[str, Any]:
    return {"questions": asked, "right": {"mean": mean, "low": low, "high": high}}


FIGURES: dict[str, Any] = {
    "parts": {
        "words": {
            "questions": 200,
            "columns": {
                "base": column(200, 0.12, 0.08, 0.17),
                "base_retrieval": column(200, 0.615, 0.55, 0.68),
                "base_passage": column(198, 0.88, 0.83, 0.92),
                "tuned": column(200, 0.74, 0.68, 0.8),
                "tuned_retrieval": column(200, 0.835, 0.78, 0.88),
            },
        },
        "left_out": {"questions": 40, "columns": {"base": column(40, 0.1, 0, 0.2), "tuned": column(40, 0.12, 0, 0.2)}},
    },
    "unanswerable": {"questions": 20, "base": 0.35, "tuned": 0.6},
    "elsewhere": {"prompts": 100, "nats": 0.04},
    "coverage": {"sentences": 2140, "with_question": 1990},
    "dropped": {"ungrounded": 181, "unsure": 97},
    "advice": ["Do this."],
}
