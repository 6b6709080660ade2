"""Figures of models on the same rows: by source, in pairs, and what counts as right."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.ask.likelihood import Asked, RowScores
from qlora.ask.measured import Measured, figures_of
from qlora.data.chat import TokenRow
from qlora.data.token_cache import PreparedSplit
from qlora.events import Recorder
from qlora.training.questions import Question

ROWS, ASKED = 30, 10


def asked() -> Asked:
    rows = [TokenRow([5, 6, 7], [0.0, 1.0, 1.0])] * ROWS
    wheres = [f"{'one' if row < 20 else 'two'}.jsonl:{row + 1}" for row in range(ROWS)]
    split = PreparedSplit(rows, [3] * ROWS, [2] * ROWS, wheres, [0] * ROWS)
    questions = [Question([5], "What is the price?", f"It costs {number} euros.") for number in range(ASKED)]
    chat: Any = None
    return Asked(split, chat, 64, [3 * number for number in range(ASKED)], questions, 9, Recorder(), lambda: None)


def measured(name: str, nats: float, right: int) -> Measured:
    scores = RowScores([nats + 0.01 * row for row in range(ROWS)], [1.0] * ROWS, [2.0] * ROWS)
    answers = [f"It costs {number} euros." if number < right else "no" for number in range(ASKED)]
    return Measured(name, "adapter", "transformers", scores, answers)


def test_loss_and_answers_by_source() -> None:
    (line,) = figures_of([measured("a", 2.0, 5)], asked())["models"]
    assert line["loss"]["mean"] == pytest.approx((2.0 + 0.01 * 14.5) / 2)
    assert line["exact_match"]["mean"] == line["contains"]["mean"] == 0.5
    one, two = line["sources"]["one.jsonl"], line["sources"]["two.jsonl"]
    assert (one["rows"], two["rows"]) == (20, 10)
    assert one["loss"]["mean"] == pytest.approx((2.0 + 0.01 * 9.5) / 2)
    assert two["loss"]["mean"] == pytest.approx((2.0 + 0.01 * 24.5) / 2)
    assert one["exact_match"]["mean"] == pytest.approx(5 / 7)  # rows 0, 3 … 18 were asked, and 21, 24, 27
    assert two["exact_match"]["mean"] == 0.0


def test_equal_rows_are_no_certainty() -> None:
    (line,) = figures_of([measured("a", 2.0, 0)], asked())["models"]
    assert line["token_accuracy"]["mean"] == 0.5
    assert line["token_accuracy"]["low"] < 0.5 < line["token_accuracy"]["high"]
    assert line["exact_match"]["high"] > 0.2


def test_each_pair_is_compared_on_the_same_rows() -> None:
    models = [measured("a", 2.0, 1), measured("b", 1.9, 9), measured("c", 2.0, 1)]
    pairs = {(pair["one"], pair["other"]): pair for pair in figures_of(models, asked())["pairs"]}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    better, same = pairs["a", "b"], pairs["a", "c"]
    assert better["beyond_chance"] and better["loss_difference"]["mean"] == pytest.approx(-0.05)
    assert better["exact_match"] == {"only_one": 0, "only_other": 8, "p": pytest.approx(2 / 2**8)}
    assert not same["beyond_chance"] and same["exact_match"]["p"] == 1.0


def test_what_a_model_thinks_before_it_answers_is_no_answer() -> None:
    one = measured("a", 2.0, ASKED)
    one.answers = [f"<think>7 euros</think> {answer}" for answer in one.answers]
    (line,) = figures_of([one], asked())["models"]
    assert line["exact_match"]["mean"] == 1.0
    one.answers = ["<think>It costs 0 euros.</think> no"] * ASKED
    (line,) = figures_of([one], asked())["models"]
    assert line["contains"]["mean"] == 0.0
