"""The exam of a run: the same rows and the same questions before, between and after its steps.

The untuned model answers first, and its answers stand beside all later ones. Where memory runs out, what was asked is
asked again in smaller batches. Measuring and telling are two calls: what a stop has interrupted must not be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from qlora.events import Evaluated, Sampled
from qlora.recipe.sections import EvalSection
from qlora.training.evaluate import SAMPLE_TOKENS, Evaluator, Question
from qlora.training.recovery import MemorySettings, OomRecovery


class RunEvaluation:
    """The evaluation rows of one run, measured within what memory there is."""

    def __init__(self, evaluator: Evaluator, section: EvalSection, guard: OomRecovery) -> None:
        self.evaluator = evaluator
        self.section = section
        self.guard = guard
        self.samples: list[Question] = []  # what the untuned model has answered
        self.untuned_answers: list[str] = []

    @cached_property
    def questions(self) -> list[Question]:
        return self.evaluator.questions(max(self.section.samples, self.section.exact_match_rows))

    def resize(self, now: MemorySettings) -> None:
        """Batches of evaluation and of answers, as memory allows them from now on."""
        self.evaluator = replace(
            self.evaluator, micro_batch_size=now.micro_batch_size, answers_at_once=now.answers_at_once
        )

    def sample_baseline(self, step: int) -> None:
        """Ask the untuned model what is shown as samples."""
        if chosen := self.questions[: self.section.samples]:
            self.untuned_answers = self._answers(step, chosen, untuned=True)
            self.samples = chosen

    def sample_answers(self, step: int) -> list[str]:
        """The model's answers now; none where the untuned model was not asked."""
        return self._answers(step, self.samples) if self.samples else []

    def loss(self, step: int) -> float:
        """Mean loss in nats per trained token over all evaluation rows."""
        return self.guard.run(step, lambda: self.evaluator.loss())

    def exact_match(self, step: int) -> float | None:
        """Share of questions answered exactly; None where that was not asked for, or no row is a question."""
        chosen = self.questions[: self.section.exact_match_rows]
        if not chosen:
            return None
        return self.guard.run_generation(step, lambda: self.evaluator.exact_match(chosen))

    def emit_eval(self, step: int, loss: float | None, matches: float | None, best: bool) -> None:
        perplexity = None if loss is None else math.exp(min(loss, 700.0))
        rows = len(self.evaluator.split.lengths)
        self.guard.sink.emit(Evaluated(step, loss, perplexity, matches, rows, best))

    def emit_samples(self, step: int, answers: Sequence[str]) -> None:
        """Each answer of `sample_answers` beside the untuned model's."""
        for question, before, after in zip(self.samples, self.untuned_answers, answers, strict=True):
            self.guard.sink.emit(Sampled(step, question.asked, question.expected, before, after))

    def _answers(self, step: int, questions: Sequence[Question], untuned: bool = False) -> list[str]:
        return self.guard.run_generation(
            step, lambda: self.evaluator.answers(questions, untuned=untuned, limit=SAMPLE_TOKENS)
        )
