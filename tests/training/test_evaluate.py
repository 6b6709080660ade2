"""Questions are asked in smaller batches when memory runs out, and told only when all of an exam is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qlora.events import Recorder
from qlora.recipe.sections import EvalSection
from qlora.training.evaluate import Evaluator, Question
from qlora.training.exam import RunEvaluation
from qlora.training.recovery import MemorySettings, OomRecovery
from tests.data.test_loader import data_of, split_of
from tests.runs import values

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scripted(Evaluator):
    """Answers with the question itself, in at most 4 at once; the untuned model says no."""

    def questions(self, limit: int) -> list[Question]:
        return [Question([n], f"question {n}", f"question {n}" if n else "another") for n in range(min(limit, 4))]

    def answers(self, questions: Sequence[Question], untuned: bool = False, limit: int | None = None) -> list[str]:
        if self.answers_at_once > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB.")
        return ["no" if untuned else question.asked for question in questions]


def exam_of(recorder: Recorder, **section: int) -> RunEvaluation:
    unused: Any = None
    evaluator = Scripted(unused, unused, unused, split_of([3] * 5), data_of(), 0, CPU, recorder, 2)
    guard = OomRecovery(MemorySettings(2, True), CPU, recorder, lambda now: exam.resize(now))
    exam = RunEvaluation(evaluator, EvalSection(**section), guard)
    return exam


def test_answers_stand_beside_the_untuned_models() -> None:
    recorder = Recorder()
    exam = exam_of(recorder, samples=2, exact_match_rows=4)
    exam.sample_baseline(0)
    assert values(recorder, "recovered", "message")[-1].startswith("out of memory: Tried to allocate 1 MiB: 4 instead")
    answers = exam.sample_answers(3)
    assert exam.exact_match(3) == 0.75
    assert not recorder.of("eval") and not recorder.of("sample")
    exam.emit_eval(3, 2.0, 0.75, best=True)
    exam.emit_samples(3, answers)
    assert values(recorder, "eval", "rows") == [5]
    assert values(recorder, "eval", "perplexity") == [pytest.approx(7.389056)]
    assert values(recorder, "sample", "base") == ["no", "no"]
    assert values(recorder, "sample", "tuned") == ["question 0", "question 1"]


def test_nothing_is_asked_that_the_recipe_does_not_ask_for() -> None:
    recorder = Recorder()
    exam = exam_of(recorder, samples=0, exact_match_rows=0)
    exam.sample_baseline(0)
    assert exam.sample_answers(1) == [] and exam.exact_match(1) is None
    exam.emit_samples(1, [])
    assert not recorder.events


def test_without_the_untuned_models_answers_no_samples_are_shown() -> None:
    """A run that was finished already, and is resumed: its first look asks nothing."""
    recorder = Recorder()
    exam = exam_of(recorder, samples=2)
    assert exam.sample_answers(6) == []
    exam.emit_samples(6, [])
    assert not recorder.events
