"""A question without rows: answered as a run would decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from qlora import api
from qlora.errors import ModelError
from qlora.memory.question import Question
from tests.memory.by_hand import AUTO, ByHand, recipe
from tests.memory.cases import GIB
from tests.memory.shapes import config_folder


def test_a_question_is_answered_as_a_run_would_decide() -> None:
    """The search, and the estimate of "auto" keys, keep the reserve; the limit that they say is the whole one."""
    asked = recipe("train.micro_batch_size=16", "train.gradient_checkpointing=true")
    question = Question(asked, cast(Any, ByHand(6.2)))
    assert [plan.changes for plan in question.search()] == [
        {"train.micro_batch_size": 2},
        {"train.micro_batch_size": 1},
    ]
    assert {plan.estimate.limit_bytes for plan in question.search()} == {int(6.2 * GIB)}
    estimate = Question(recipe(*AUTO), cast(Any, ByHand(6.2))).estimate()
    assert (estimate.settings["train.micro_batch_size"], estimate.limit_bytes) == (2, int(6.2 * GIB))


def test_a_model_that_cannot_be_simulated_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = api.question(
        api.recipe_or_model(str(config_folder("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path))), vram="8GiB"
    )

    def fail(*_: Any) -> None:
        raise TypeError("what a stranger's numbers make of transformers' code")

    monkeypatch.setattr(question.estimator, "estimate", fail)
    for ask in (question.estimate, question.search, question.does_not_fit):
        with pytest.raises(
            ModelError, match=r"config\.json: a step of this model cannot be simulated \(what a stranger"
        ):
            ask()
