"""Measuring on the evaluation rows: loss, exact match of greedy answers, samples beside the untuned base's.

Nothing here touches what the next training step depends on: modules go back to the mode they were in, random numbers
are not drawn, gradients are off. A run with evaluation therefore equals one without, bit for bit. Measuring and
emitting are two calls: what a stop has interrupted must not be emitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from qlora.data.chat import ChatTokenizer
from qlora.data.layout import Layout
from qlora.data.prepare import PreparedSplit
from qlora.events import Evaluated, Preferred, Sampled
from qlora.export.verify.evaluation import EvalRows, mean
from qlora.model import generate, routing
from qlora.model.delivered_loss import DeliveredLoss
from qlora.recipe.sections import DataSection, EvalSection
from qlora.reward_events import Rewarded
from qlora.rewards.compare import same_answer
from qlora.step.forward import CausalParts, batch_loss, evaluating
from qlora.step.loss import Objective
from qlora.training import measuring, preferences
from qlora.training.checkpoint import RunState
from qlora.training.dividing import Division
from qlora.training.phases import PhaseClock
from qlora.training.questions import Question, answer_tokens, questions_of
from qlora.training.recovery import OomRecovery


@dataclass
class RunEvaluation:
    """The same rows and questions before, between and after the steps of a run, within what memory there is.

    The untuned model answers first, and its answers stand beside all later ones. Where memory runs out, rows and
    questions go through the model in smaller batches.
    """

    model: Any
    parts: CausalParts
    objective: Objective
    chat: ChatTokenizer
    split: PreparedSplit
    data: DataSection
    section: EvalSection
    recovery: OomRecovery
    clock: PhaseClock
    began: preferences.Began | None = None  # what the model is compared with
    judge: Callable[[int], Rewarded | None] | None = None  # of objectives that draw answers: what they are worth
    check_stop: Callable[[], None] = lambda: None  # raises when it is time to leave
    shares: Division = field(default_factory=Division)  # with other processes
    samples: Sequence[Question] = ()  # what the untuned model has answered
    untuned_answers: Sequence[str] = ()
    routed: Sequence[routing.LayerRouting] = ()  # of the last measuring, of a mixture of experts
    told: Preferred | Rewarded | None = None  # and of an objective of preference, or of rewards
    delivered: DeliveredLoss | None = None  # what the last measuring says to whoever checks the adapter later

    @cached_property
    def questions(self) -> list[Question]:
        return questions_of(self.split, self.chat, max(self.section.samples, self.section.exact_match_rows))

    def try_longest(self) -> None:
        """One micro-batch of the longest rows, for what it takes in memory."""
        with evaluating(self.model):
            batch_loss(self.parts, self.rows()[0].to(self.recovery.device), self.objective)

    def rows(self) -> EvalRows:
        """The rows in micro-batches as large as they are now."""
        at_once, layout = self.recovery.settings.micro_batch_size, Layout.on(self.recovery.device)
        return EvalRows(self.split, self.data, self.chat.pad_id, at_once, layout)

    def loss(self, step: int) -> float:
        """The objective's mean over all evaluation rows; nats per trained token where it is supervised, and less than
        no reward where answers are judged."""
        with self.clock.phase("evaluation"):
            loss = self.recovery.run_forward(step, partial(self._loss, step))
            self.told = self.judge(step) if self.judge else self.told
        return loss if not isinstance(self.told, Rewarded) else -self.told.reward

    def exact_match(self, step: int) -> float | None:
        """Share of questions answered exactly; None where that was not asked for, or no row is a question."""
        chosen = self.questions[: self.section.exact_match_rows]
        if not chosen:
            return None
        with self.clock.phase("evaluation"):
            answers = self.recovery.run_generation(step, lambda: self.answers(len(chosen)))
        return sum(same_answer(a, q.expected) for a, q in zip(answers, chosen, strict=True)) / len(chosen)

    def sample_baseline(self, step: int) -> None:
        """Ask the untuned model what is shown as samples."""
        chosen = self.questions[: self.section.samples]
        self.untuned_answers = self._sample_answers(step, chosen, untuned=True)
        self.samples = chosen

    def sample_answers(self, step: int) -> list[str]:
        """The model's answers now; none where the untuned model was not asked."""
        return self._sample_answers(step, self.samples)

    def emit_eval(self, step: int, loss: float | None, matches: float | None, best: bool) -> None:
        perplexity = preferences.perplexity(self.objective, loss)
        if self.told is not None and self.told.step == step and loss is not None:  # which says what the loss is of
            self.recovery.sink.emit(self.told)
        self.recovery.sink.emit(Evaluated(step, loss, perplexity, matches, len(self.split.lengths), best))
        if self.routed and loss is not None:
            self.recovery.sink.emit(routing.event(step, self.routed))

    def emit_samples(self, step: int, answers: Sequence[str]) -> None:
        """Each answer of `sample_answers` beside the untuned model's."""
        for question, before, after in zip(self.samples, self.untuned_answers, answers, strict=True):
            self.recovery.sink.emit(Sampled(step, question.asked, question.expected, before, after))

    def losses(self, rows: EvalRows) -> list[tuple[Tensor, float]]:
        """Of each micro-batch its summed loss and what it counts, whichever process computes it."""
        told = measuring.Told(self.check_stop, self.recovery.sink)
        return measuring.losses(self.model, self.parts, self.objective, rows, told, self.shares)

    def _loss(self, step: int) -> float:
        rows = self.rows()
        with self.shares.called({"do": "evaluate"}, self.recovery.settings):
            losses = self.losses(rows)
        with evaluating(self.model):
            self.routed = routing.compared(self.model, self.parts, lambda: rows[0].to(self.recovery.device))
        of_run = (self.objective, self.model, self.parts)
        kl = preferences.kl_to_reference(*of_run, rows, self.began) if self.began else None
        self.told = preferences.figures(self.objective, step, evaluated=True, kl=kl)
        self.delivered = rows.record(step, preferences.plain_losses(self.objective, losses))
        return mean(losses)

    def _sample_answers(self, step: int, questions: Sequence[Question], untuned: bool = False) -> list[str]:
        if not questions:
            return []
        with self.clock.phase("samples"):
            few = partial(self.answers, len(questions), untuned, generate.SAMPLE_TOKENS)
            return self.recovery.run_generation(step, few)

    def answers(self, count: int, untuned: bool = False, limit: int | None = None) -> list[str]:
        """Greedy answers to the first questions as text, of the tuned model or of the base under it. Without a `limit`
        they are of the weights that this process has now, which may be none of training's."""
        chosen, now = self.questions[:count], self.recovery.settings
        longest = answer_tokens(chosen, self.chat)
        asked = measuring.Asked(chosen, now.answers_at_once, min(longest, limit) if limit else longest, self.chat)
        told = measuring.Told(self.check_stop, self.recovery.sink)
        word = {"do": "answer", "count": count, "untuned": untuned, "limit": limit, "weights": limit is None}
        called = self.shares.called(word, now) if count > now.answers_at_once else nullcontext()
        with evaluating(self.model), self.model.disable_adapter() if untuned else nullcontext(), called:
            return measuring.answers(self.model, asked, told, self.shares)


def with_evaluation(state: RunState, loss: float, patience: int) -> RunState:
    """The state with an evaluation behind it; stopped early after `patience` of them without improvement (0: never)."""
    is_best = state.best_loss is None or loss < state.best_loss
    waited = 0 if is_best else state.evaluations_without_improvement + 1
    return replace(
        state,
        eval_loss=loss,
        evaluated_step=state.step,
        evaluations_without_improvement=waited,
        stopped_early=state.stopped_early or (0 < patience <= waited),
    )
