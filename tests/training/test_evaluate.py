"""Questions are asked in smaller batches when memory runs out; answers are emitted only when all of them are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.events import Recorder
from qlora.recipe.sections import EvalSection
from qlora.step.loss import SupervisedObjective
from qlora.training.checkpoint import RunState
from qlora.training.evaluate import RunEvaluation, with_evaluation
from qlora.training.memory_plan import MemorySettings
from qlora.training.phases import PhaseClock
from qlora.training.questions import Question
from qlora.training.recovery import OomRecovery
from tests.data.cases import data_of, split_of
from tests.runs import train, values, write_recipe

CPU = torch.device("cpu")


class Scripted(RunEvaluation):
    """Answers with the question itself, in at most 4 at once; the untuned model says no."""

    @property
    def questions(self) -> list[Question]:  # type: ignore[override]
        limit = max(self.section.samples, self.section.exact_match_rows)
        return [Question([n], f"question {n}", f"question {n}" if n else "another") for n in range(min(limit, 4))]

    def answers(self, count: int, untuned: bool = False, limit: int | None = None) -> list[str]:
        if self.recovery.settings.answers_at_once > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB.")
        return ["no" if untuned else question.asked for question in self.questions[:count]]


def evaluation_of(recorder: Recorder, **section: int) -> RunEvaluation:
    unused: Any = None
    recovery = OomRecovery(MemorySettings(2, True), CPU, recorder, lambda settings: None)
    return Scripted(
        model=unused,
        parts=unused,
        objective=SupervisedObjective(),
        chat=unused,
        split=split_of([3] * 5),
        data=data_of(),
        section=EvalSection(**section),
        recovery=recovery,
        clock=PhaseClock(recorder),
    )


def test_answers_stand_beside_the_untuned_models() -> None:
    recorder = Recorder()
    evaluation = evaluation_of(recorder, samples=2, exact_match_rows=4)
    evaluation.sample_baseline(0)
    assert values(recorder, "recovered", "message")[-1].startswith("out of memory: Tried to allocate 1 MiB: 4 instead")
    answers = evaluation.sample_answers(3)
    assert evaluation.exact_match(3) == 0.75
    assert not recorder.of("eval") and not recorder.of("sample")
    evaluation.emit_eval(3, 2.0, 0.75, best=True)
    evaluation.emit_samples(3, answers)
    assert values(recorder, "eval", "rows") == [5]
    assert values(recorder, "eval", "perplexity") == [pytest.approx(7.389056)]
    assert values(recorder, "sample", "base") == ["no", "no"]
    assert values(recorder, "sample", "tuned") == ["question 0", "question 1"]
    assert set(evaluation.clock.seconds) == {"samples", "evaluation"}


def test_nothing_is_asked_that_the_recipe_does_not_ask_for() -> None:
    recorder = Recorder()
    evaluation = evaluation_of(recorder, samples=0, exact_match_rows=0)
    evaluation.sample_baseline(0)
    assert evaluation.sample_answers(1) == [] and evaluation.exact_match(1) is None
    evaluation.emit_samples(1, [])
    assert not recorder.events


def test_without_the_untuned_models_answers_no_samples_are_shown() -> None:
    """A run that was finished already, and is resumed: its untuned model is not asked again."""
    recorder = Recorder()
    evaluation = evaluation_of(recorder, samples=2)
    assert evaluation.sample_answers(6) == []
    evaluation.emit_samples(6, [])
    assert not recorder.events


def test_answers_show_that_they_are_being_written(tmp_path: Path, llama: Path) -> None:
    recorder = train(write_recipe(tmp_path, llama), "train.max_steps=1", "eval.samples=1", "eval.exact_match_rows=2")
    drawn = [event.as_dict() for event in recorder.of("progress") if event.as_dict()["task"] == "answer"]
    asked = [place for place, event in enumerate(drawn) if event["done"] == 0]
    assert len(asked) == 4  # samples and exact match of the untuned model and of the tuned one
    for start, end in zip(asked, [*asked[1:], len(drawn)], strict=True):
        done = [event["done"] for event in drawn[start:end]]
        assert done == sorted(done) and done[-1] == drawn[start]["total"] and len(done) > 2


def test_patience_counts_evaluations_without_improvement() -> None:
    first = with_evaluation(RunState(step=1), 2.0, patience=2)
    assert (first.eval_loss, first.evaluated_step, first.evaluations_without_improvement) == (2.0, 1, 0)
    best = RunState(step=2, best_loss=2.0, evaluations_without_improvement=1)
    assert with_evaluation(best, 1.9, patience=2).evaluations_without_improvement == 0
    assert with_evaluation(best, 2.0, patience=2).stopped_early
    assert not with_evaluation(best, 2.0, patience=3).stopped_early
    assert not with_evaluation(best, 2.0, patience=0).stopped_early
