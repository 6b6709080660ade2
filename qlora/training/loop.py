"""A run, in reading order: check, evaluate the untuned model, then step, evaluate and save until it is done.

The loop emits events and draws nothing. A step is a function of the recipe and of the run's state alone: which rows it
reads follows from its number, and so does every random number, so that a resumed run is the same run. Signals are read
between micro-batches; what an unfinished step has gathered is thrown away and its rows are read again, and so is an
unfinished evaluation: the state that is saved is always that of a completed step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora import run_folder
from qlora.batch import Batch
from qlora.data.chat import ChatTokenizer
from qlora.data.loader import TrainOrder, collate
from qlora.data.prepare import PreparedData
from qlora.errors import StoppedBySignal, TrainingStopped
from qlora.events import End, Evaluated, Notice, Plan, Recovered, Sampled, Sink, StepDone
from qlora.model import adapters
from qlora.model.hub import BaseFolder
from qlora.recipe import Recipe
from qlora.step.forward import CausalParts, forward_backward, seed_micro_batch, set_gradient_checkpointing
from qlora.step.optimizer import AdapterOptimizer
from qlora.training import checkpoint, fit, health, probe, schedule, selfcheck
from qlora.training.checkpoint import Checkpoint, Fingerprints, RunState
from qlora.training.deliver import Delivery, delivered_step
from qlora.training.evaluate import SAMPLE_TOKENS, Evaluator, Question
from qlora.training.health import Trend
from qlora.training.memory_use import measure, peak_bytes
from qlora.training.recovery import Fit, MemoryGuard
from qlora.training.saving import Saver
from qlora.training.stop import StopAsked, StopRequest


@dataclass(frozen=True)
class Job:
    """All that a run works on, ready to use: the model has its adapters, the rows are tokens."""

    recipe: Recipe
    run_dir: Path
    model: Any  # peft's wrapper around the causal LM
    base: BaseFolder
    chat: ChatTokenizer
    data: PreparedData
    device: torch.device
    pad_id: int
    sink: Sink
    stop: StopRequest
    fit: Fit


def run(job: Job, resume_from: Checkpoint | None) -> RunState:
    """Train to the end. Raises StoppedBySignal and TrainingStopped with the last completed step saved."""
    training = Training(job)
    with job.stop.being_read():
        try:
            state = training.begin(resume_from)
            training.try_the_worst(state)
            state = training.first_look(state)
            while True:
                if training.evaluation_is_due(state):
                    state = training.evaluate(state)
                training.save_if_due(state)
                if training.is_finished(state):
                    return training.finish(state)
                state = training.step(state)
        except StopAsked:
            raise training.stopped() from None
        except TrainingStopped:
            job.sink.emit(training.end("stopped by itself"))
            raise


class Training:
    """A run that is under way."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        self.job = job
        self.sink = job.sink
        self.train = recipe.train
        self.parameters = adapters.trainable(job.model)
        self.causal_lm = job.model.get_base_model()
        self.parts = CausalParts.of(self.causal_lm)
        self.optimizer = AdapterOptimizer(self.parameters, recipe.train.optimizer, recipe.train.weight_decay)
        self.guard = MemoryGuard(job.fit, job.device, job.sink, self._apply)
        self.fingerprints = Fingerprints(job.base.fingerprint, job.data.fingerprint)
        self.data_section = recipe.data
        self.batch_size, self.order = self._make_order()
        self.steps = recipe.train.max_steps or self.order.steps(recipe.train.epochs or schedule.DEFAULT_EPOCHS)
        self.evaluator = self._make_evaluator()
        self.delivery = Delivery(
            job.model,
            job.base,
            recipe,
            job.chat.template,
            len(job.data.train.lengths),
            len(job.data.eval.lengths),
        )
        self.questions: list[Question] = []
        self.base_answers: list[str] = []
        self.saver = Saver(job.run_dir, recipe.checkpoint, job.sink, job.stop)
        self.about = run_folder.provenance(recipe)
        self.at_start = health.fingerprints(self.optimizer.masters)
        self.completed = RunState()  # the last state that may be saved

    # --- before the first step -----------------------------------------------------------------------------------

    def begin(self, resume_from: Checkpoint | None) -> RunState:
        """Check the loss against the model's own, put a checkpoint back, and say what will happen."""
        if resume_from is not None:
            self._take_fit_of(resume_from.state)
        self._apply(self.guard.fit)
        check = selfcheck.run(self.causal_lm, self.parts, self.job.data.train, self.job.device)
        if check is not None and self.data_section.packing and not check.packing_is_safe:
            self.sink.emit(
                Notice(
                    "packing",
                    f"switched off: documents of one pack see each other in this architecture "
                    f"({check.leak:.2f} nats a token; {check.head:.3f} alone)",
                )
            )
            self._without_packing()
        if self.train.optimizer.startswith("paged_") and not self.optimizer.paged:
            self.sink.emit(
                Notice("optimizer", f"{self.train.optimizer}: paging needs a CUDA GPU; its state stays in RAM")
            )
        self.sink.emit(self.plan())
        if self.steps < schedule.FEW_STEPS:
            self.sink.emit(
                Notice("steps", f"only {self.steps} optimizer steps: little is learned in so few", self.steps)
            )
        if resume_from is not None:
            checkpoint.restore(resume_from, self.parameters, self.optimizer, self.fingerprints)
            self.saver.saved_step = resume_from.state.step
            self.completed = resume_from.state
            if changed := checkpoint.other_versions(resume_from, self.about):
                self.sink.emit(Notice("versions", f"the checkpoint was made with {changed}: last digits may differ"))
        self.saver.check_room(self.optimizer, sum(parameter.nbytes for parameter in self.parameters.values()))
        return self.completed

    def plan(self) -> Plan:
        data, order = self.job.data, self.order
        batch, micro = self.batch_size, self.guard.fit.micro_batch_size
        packs = len(order.epoch_packs(0))
        unit = "packs" if self.data_section.packing else "rows"
        per_epoch = order.steps(1.0)
        trainable, total = self.job.model.get_nb_trainable_parameters()
        return Plan(
            train_rows=len(data.train.lengths),
            eval_rows=len(data.eval.lengths),
            packs=packs,
            tokens_per_epoch=sum(data.train.lengths),
            trained_tokens_per_epoch=sum(data.train.trained),
            batch_size=batch,
            micro_batch_size=micro,
            accumulation=math.ceil(batch / micro),
            steps=self.steps,
            epochs=order.epoch_of_step(self.steps),
            trainable_parameters=trainable,
            total_parameters=total,
            packing=self.data_section.packing,
            gradient_checkpointing=self.guard.fit.gradient_checkpointing,
            max_length=self.data_section.max_length,
            arithmetic=(
                f"{packs} {unit} an epoch ÷ {batch} a step = {per_epoch} steps an epoch; "
                f"{batch} {unit} a step = {math.ceil(batch / micro)} micro-batches of {micro}"
            ),
            memory=None if self.guard.fit.plan is None else fit.as_event(self.guard.fit.plan),
        )

    def try_the_worst(self, state: RunState) -> None:
        """The longest micro-batch, an update and the longest evaluation batch, before anything is counted on."""
        if self.is_finished(state):
            return

        def work() -> None:
            rows = self.guard.fit.micro_batch_size
            packs = probe.longest(self.order.epoch_packs(0), self.job.data.train.lengths, rows)
            batch = self._collate(packs)
            # Twice, as in a step of several micro-batches: the second one finds the gradients of the first.
            self._gather_gradient(state, [batch] * min(2, math.ceil(self.batch_size / rows)), 1.0)
            self.optimizer.clip(self.optimizer.gradient_norm(), self.train.max_grad_norm)
            self.optimizer.step(0.0)
            if self.evaluator is not None:
                self.evaluator.try_longest()

        self.guard.within(
            state.step,
            lambda: probe.leave_no_trace(self.optimizer, self.job.device, work),
            self.optimizer.zero_gradients,
        )

    def first_look(self, state: RunState) -> RunState:
        """Ask the untuned model the sample and exact-match questions; measure its loss when nothing is trained yet."""
        section = self.job.recipe.eval
        count = max(section.samples, section.exact_match_rows)
        if self.evaluator is None or self.is_finished(state):
            return state
        self.questions = self.evaluator.questions(count)
        if section.samples and self.questions:
            chosen = self.questions[: section.samples]
            self.base_answers = self._answers(state.step, chosen, untuned=True)
        if state.step > 0:
            return state
        matches = self._exact_match(state.step)
        loss = self._measured_loss(state.step)
        self._say_evaluation(0, loss, matches, best=False)
        return replace(state, exact_match_before=matches, eval_loss=loss)

    # --- the step ------------------------------------------------------------------------------------------------

    def step(self, state: RunState) -> RunState:
        """One optimizer step, or, when its numbers are not finite, none."""
        started = time.monotonic()
        packs = self.order.packs_of_step(state.step)
        batches, rows = self._micro_batches(packs), self.guard.fit.micro_batch_size
        step_weight = sum(float(batch.loss_weights_BS.sum()) for batch in batches)

        def gather() -> list[torch.Tensor]:
            fitting = batches if rows == self.guard.fit.micro_batch_size else self._micro_batches(packs)
            return self._gather_gradient(state, fitting, step_weight)

        losses = self.guard.within(state.step + 1, gather, self.optimizer.zero_gradients)
        norm = self.optimizer.gradient_norm()
        # The one question that a step asks the device: is all of it finite? Only then does the update happen.
        mean = torch.stack(losses).sum() / max(step_weight, 1e-9)
        loss_value, norm_value = (float(value) for value in torch.stack([mean, norm]).tolist())
        progress = schedule.progress_of(state.step, self.steps, state.seconds, self.train)
        rate = schedule.learning_rate(progress, self.train)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._skip(state, losses, self._split(packs))
            skipped = state.skipped_in_a_row + 1
        else:
            self.optimizer.clip(norm, self.train.max_grad_norm)
            self.guard.or_end(lambda: self.optimizer.step(rate))
            skipped = 0
        seconds = time.monotonic() - started
        tokens = sum(self.job.data.train.lengths[row] for pack in packs for row in pack)
        trained = sum(int(batch.trained_T.numel()) for batch in batches)
        state = replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + tokens,
            trained_tokens=state.trained_tokens + trained,
            seconds=state.seconds + seconds,
            skipped=state.skipped + (skipped > 0),
            skipped_in_a_row=skipped,
            micro_batch_size=self.guard.fit.micro_batch_size,
            gradient_checkpointing=self.guard.fit.gradient_checkpointing,
        )
        if skipped == 0:
            state = self._with_loss(state, loss_value)
        self.completed = state
        if skipped >= health.SKIPS_BEFORE_STOPPING:
            self._save(state, last_chance=True)
            raise TrainingStopped(
                f"step {state.step}: loss or gradient was not finite {skipped} times in a row",
                "lower train.learning_rate; the weights of the last good step are in the newest checkpoint",
            )
        if skipped == 0:
            self.sink.emit(
                StepDone(
                    step=state.step,
                    epoch=self.order.epoch_of_step(state.step),
                    loss=loss_value,
                    learning_rate=rate,
                    grad_norm=norm_value,
                    tokens=tokens,
                    trained_tokens=trained,
                    tokens_per_second=tokens / seconds,
                    peak_bytes=peak_bytes(self.job.device),
                    seconds=seconds,
                )
            )
        return state

    def _gather_gradient(self, state: RunState, batches: Sequence[Batch], step_weight: float) -> list[torch.Tensor]:
        """Forward and backward of each micro-batch; each one's summed loss in nats, still on the device."""
        self.job.model.train()
        losses = []
        for micro_step, batch in enumerate(batches):
            self._check_stop()
            if batch.trained_T.numel() == 0:
                losses.append(torch.zeros((), device=self.job.device))  # it adds nothing to loss nor gradient
                continue
            seed_micro_batch(self.train.seed, state.step, micro_step)
            placed = batch.to(self.job.device)
            losses.append(forward_backward(self.parts, placed, step_weight, self.train.neftune_alpha))
        self._check_stop()
        return losses

    def _check_stop(self) -> None:
        if self.job.stop.is_set:
            self.optimizer.zero_gradients()
        self.job.stop.check()

    def _skip(
        self, state: RunState, losses: Sequence[torch.Tensor], micro_batches: Sequence[Sequence[tuple[int, ...]]]
    ) -> None:
        self.optimizer.zero_gradients()
        rows = health.rows_behind(torch.stack(list(losses)).tolist(), micro_batches, self.job.data.train)
        message = f"loss or gradient not finite: step skipped, weights unchanged; its rows: {rows}"
        self.sink.emit(Recovered(state.step + 1, message))

    def _with_loss(self, state: RunState, loss: float) -> RunState:
        """The state with the step's loss in its course; a loss that jumps out of it is said."""
        trend = Trend(state.loss_trend, state.loss_spread, state.losses_seen)
        if trend.is_spike(loss):
            times = loss / max(trend.mean, 1e-9)
            self.sink.emit(Notice("loss", f"spike at step {state.step}: {loss:.3f}, {times:.1f} times its course"))
        trend = trend.after(loss)
        return replace(state, train_loss=loss, loss_trend=trend.mean, loss_spread=trend.spread, losses_seen=trend.seen)

    # --- between steps -------------------------------------------------------------------------------------------

    def is_finished(self, state: RunState) -> bool:
        out_of_time = self.train.max_minutes is not None and state.seconds >= 60 * self.train.max_minutes
        return state.step >= self.steps or state.stopped_early or out_of_time

    def evaluation_is_due(self, state: RunState) -> bool:
        if self.evaluator is None or state.step in (0, state.evaluated_step):
            return False
        return state.step % self.job.recipe.eval.every_steps == 0 or self.is_finished(state)

    def evaluate(self, state: RunState) -> RunState:
        """Measure, deliver the adapter when it is the best so far, and decide whether it is time to stop."""
        loss = self._measured_loss(state.step)
        answers = self._sample_answers(state.step)
        best = state.best_loss is None or loss < state.best_loss
        waited = 0 if best else state.evaluations_without_improvement + 1
        patience = self.job.recipe.eval.early_stopping_patience
        evaluated = replace(
            state,
            eval_loss=loss,
            evaluated_step=state.step,
            evaluations_without_improvement=waited,
            stopped_early=state.stopped_early or (0 < patience <= waited),
        )
        self._say_evaluation(state.step, loss, None, best)
        self._say_samples(state.step, answers)
        if best:
            bettered = replace(evaluated, best_loss=loss, best_step=state.step)
            # What could not be written is not the best: what is delivered at the end must be on the disk.
            if self.saver.deliver(lambda: self.delivery.publish(self.job.run_dir, bettered, self.sink), state.step):
                evaluated = bettered
        self.completed = evaluated
        return evaluated

    def save_if_due(self, state: RunState) -> None:
        if self.saver.is_due(state.step):
            self._save(state)

    def _save(self, state: RunState, last_chance: bool = False) -> None:
        self.saver.save(state, self.optimizer, self.fingerprints, self.about, last_chance)

    def stopped(self) -> StoppedBySignal:
        """Leave by a signal: the last completed step is saved, the gradient of an unfinished one is not."""
        state, stop = self.completed, self.job.stop
        try:
            self._save(state, last_chance=True)
        except TrainingStopped as error:
            return stop.error(error.what, error.hint)
        self.sink.emit(self.end("stopped"))
        if state.step == 0:
            return stop.error("no step was finished, nothing to save", "run the same command with --resume or --fresh")
        return stop.error(f"saved after step {state.step} of {self.steps}", "continue with --resume")

    # --- the end -------------------------------------------------------------------------------------------------

    def finish(self, state: RunState) -> RunState:
        """Save, put the best adapter back into the model, measure what is delivered, and say how it ended."""
        self._save(state, last_chance=True)
        health.check_moved(self.optimizer, self.at_start, state.step)
        if state.skipped:
            self.sink.emit(Notice("steps", "steps skipped, their numbers were not finite", state.skipped))
        # What lies on the disk counts: a life that was killed may have delivered a later best than this state knows.
        on_disk = delivered_step(self.job.run_dir)
        if self.evaluator is None or state.best_step is None or on_disk is None:
            self._deliver(state)
            delivered = state.step
        else:
            delivered = on_disk
            if delivered != state.step:
                adapters.load_into(self.job.model, self.job.run_dir / "adapter")
            state = self._final_exact_match(state, delivered)
        reason = "early stopping" if state.stopped_early else "time limit" if state.step < self.steps else "finished"
        self.sink.emit(self.end(reason, state, delivered))
        return state

    def _final_exact_match(self, state: RunState, delivered: int) -> RunState:
        wanted = self.job.recipe.eval.exact_match_rows
        if not self.evaluator or not wanted:
            return state
        self.questions = self.questions or self.evaluator.questions(wanted)
        matches = self._exact_match(state.step)
        self._say_evaluation(delivered, state.best_loss, matches, best=True)
        state = replace(state, exact_match_after=matches, eval_loss=state.best_loss)
        self._deliver(replace(state, step=delivered))
        return state

    def _deliver(self, state: RunState) -> None:
        publish = partial(self.delivery.publish, self.job.run_dir, state, self.sink)
        self.saver.deliver(publish, state.step, last_chance=True)

    def end(self, reason: str, state: RunState | None = None, delivered: int | None = None) -> End:
        state = state or self.completed
        folder = self.job.run_dir / "adapter"
        return End(
            reason=reason,
            step=state.step,
            steps=self.steps,
            seconds=state.seconds,
            tokens=state.tokens,
            trained_tokens=state.trained_tokens,
            train_loss=state.train_loss,
            eval_loss=state.eval_loss,
            exact_match_before=state.exact_match_before,
            exact_match_after=state.exact_match_after,
            peak_bytes=peak_bytes(self.job.device),
            adapter=str(folder) if folder.is_dir() else None,
            adapter_step=delivered if delivered is not None else state.best_step,
            memory=fit.compare(self.guard.fit, measure(self.job.model, self.optimizer, self.job.device)),
        )

    # --- memory --------------------------------------------------------------------------------------------------

    def _apply(self, now: Fit) -> None:
        """Settings that memory decides about: told at the start, and whenever it has run out."""
        dropout = self.job.recipe.lora.dropout > 0
        set_gradient_checkpointing(self.causal_lm, now.gradient_checkpointing, keep_random_state=dropout)
        if self.evaluator is not None:
            self.evaluator = replace(
                self.evaluator, micro_batch_size=now.micro_batch_size, answers_at_once=now.answers_at_once
            )

    def _take_fit_of(self, state: RunState) -> None:
        """Go on with what fitted: the sizes of micro-batches are part of what makes a resumed run the same run."""
        if state.micro_batch_size is not None and state.gradient_checkpointing is not None:
            self.guard.fit = replace(
                self.guard.fit,
                micro_batch_size=state.micro_batch_size,
                gradient_checkpointing=state.gradient_checkpointing,
            )

    def _measured_loss(self, step: int) -> float:
        assert self.evaluator is not None
        return self.guard.within(step, lambda: self.evaluator.loss())  # type: ignore[union-attr]

    def _answers(self, step: int, questions: Sequence[Question], untuned: bool = False) -> list[str]:
        def work() -> list[str]:
            assert self.evaluator is not None
            return self.evaluator.answers(questions, untuned=untuned, limit=SAMPLE_TOKENS)

        return self.guard.answering(step, work)

    # --- small things --------------------------------------------------------------------------------------------

    def _make_order(self) -> tuple[int, TrainOrder]:
        """The order of rows; the batch size may depend on how many packs there are, so it is made twice."""
        data, seed = self.job.data.train, self.train.seed
        trial = TrainOrder(data, self.data_section, seed, 1)
        batch_size = schedule.auto_batch_size(len(trial.epoch_packs(0)), self.train)
        return batch_size, TrainOrder(data, self.data_section, seed, batch_size)

    def _without_packing(self) -> None:
        self.data_section = self.data_section.model_copy(update={"packing": False})
        self.batch_size, self.order = self._make_order()
        self.steps = self.train.max_steps or self.order.steps(self.train.epochs or schedule.DEFAULT_EPOCHS)
        self.evaluator = self._make_evaluator()

    def _make_evaluator(self) -> Evaluator | None:
        job = self.job
        if not len(job.data.eval.lengths):
            return None
        return Evaluator(
            job.model,
            self.parts,
            job.chat,
            job.data.eval,
            self.data_section,
            job.pad_id,
            job.device,
            job.sink,
            job.fit.micro_batch_size,
            check_stop=job.stop.check,
        )

    def _split(self, packs: Sequence[tuple[int, ...]]) -> list[Sequence[tuple[int, ...]]]:
        """A step's packs by micro-batch."""
        rows = self.guard.fit.micro_batch_size
        return [packs[start : start + rows] for start in range(0, len(packs), rows)]

    def _micro_batches(self, packs: Sequence[tuple[int, ...]]) -> list[Batch]:
        return [self._collate(chosen) for chosen in self._split(packs)]

    def _collate(self, packs: Sequence[tuple[int, ...]]) -> Batch:
        return collate(self.job.data.train, packs, self.job.pad_id, self.data_section.max_length)

    def _exact_match(self, step: int) -> float | None:
        rows = self.job.recipe.eval.exact_match_rows
        if not rows or not self.questions or self.evaluator is None:
            return None
        return self.guard.answering(step, lambda: self.evaluator.exact_match(self.questions[:rows]))  # type: ignore[union-attr]

    def _say_evaluation(self, step: int, loss: float | None, matches: float | None, best: bool) -> None:
        perplexity = None if loss is None else math.exp(min(loss, 700.0))
        rows = len(self.job.data.eval.lengths)
        self.sink.emit(Evaluated(step, loss, perplexity, matches, rows, best))

    def _sample_answers(self, step: int) -> list[str]:
        if self.evaluator is None or not self.base_answers:
            return []
        return self._answers(step, self.questions[: len(self.base_answers)])

    def _say_samples(self, step: int, answers: Sequence[str]) -> None:
        chosen = self.questions[: len(answers)]
        for question, before, after in zip(chosen, self.base_answers, answers, strict=True):
            self.sink.emit(Sampled(step, question.asked, question.expected, before, after))
