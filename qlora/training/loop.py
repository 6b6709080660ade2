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
from dataclasses import replace
from functools import partial

import torch

from qlora import determinism, loss_scale
from qlora.batch import Batch
from qlora.data.ahead import Ahead, in_one_block
from qlora.dealing import Cut
from qlora.errors import StoppedBySignal, TrainingStopped
from qlora.events import End, Notice, Recovered
from qlora.guarded import Guarded
from qlora.memory.spilling import SpillWatch
from qlora.model import adapters, attention, compiled, expert_check, weight_moving
from qlora.model.adapter_folder import delivered_step
from qlora.model.adapter_seal import damage
from qlora.model.identity import Fingerprints
from qlora.model.weight_streaming import reset
from qlora.recipe.sections import DataSection
from qlora.starting_adapter import started_from
from qlora.step import offload
from qlora.step.forward import CausalParts, forward_backward, seed_micro_batch
from qlora.step.layerwise import recomputable, set_gradient_checkpointing
from qlora.step.objectives import objective_of
from qlora.step.optimizer import AdapterOptimizer
from qlora.stop import StopAsked
from qlora.training import (
    health,
    preferences,
    processes,
    reference,
    rollouts,
    rows_of_run,
    schedule,
    selfcheck,
    sharing,
)
from qlora.training.best_adapter import BestAdapter
from qlora.training.checkpoint import Checkpoint, Checkpointer, RunState, at_step
from qlora.training.ending import ended, step_done
from qlora.training.evaluate import with_evaluation
from qlora.training.memory_plan import MemorySettings
from qlora.training.recovery import OomRecovery
from qlora.training.setup import Job
from qlora.training.step_batches import Pack


def run(job: Job, resume_from: Checkpoint | None) -> RunState:
    """Train to the end. Raises StoppedBySignal and TrainingStopped with the last completed step saved."""
    with Guarded("setting up the optimizer", 'lower lora.r, or set train.optimizer = "paged_adamw_8bit"'):
        training = Training(job)
    # Not all that needs memory can be done in smaller pieces: the rest ends the run here.
    hint = "lower data.max_length or lora.r, or use a smaller base"
    with Guarded("training", hint, training.saved), job.stop.being_read(), training.ahead, training.checkpointer.saving:
        try:
            state = training.begin(resume_from)
            training.dry_run(state)
            state = training.evaluate_baseline(state)
            while True:
                if training.evaluation_is_due(state):
                    state = training.evaluate(state)
                if training.checkpointer.is_due(state.step):
                    training.checkpointer.save(state)
                if training.is_finished(state):
                    return training.finish(state)
                with job.clock.phase("training"):
                    state = training.step(state)
        except StopAsked:
            raise training.stopped() from None
        except TrainingStopped:
            training.partners.lost()
            job.sink.emit(training.end("stopped by itself"))
            raise
        finally:
            training.partners.end()
            training.optimizer.detach()


class Training:
    """A run that is under way."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        self.job = job
        self.sink = job.sink
        self.train = recipe.train
        self.causal_lm = job.model.get_base_model()
        self.parts = CausalParts.of(self.causal_lm)
        self.objective = objective_of(recipe.train)
        parameters = adapters.trainable(job.model)
        self.optimizer = AdapterOptimizer(parameters, recipe.train.optimizer, recipe.train.weight_decay)
        memory = replace(job.memory, may_move=weight_moving.movable(self.causal_lm, recipe.memory, job.device))
        self.recovery = OomRecovery(memory, job.device, job.sink, self._apply, partial(reset, self.causal_lm))
        self.pool = offload.Pool(job.device)
        self.partners = processes.of_run(self.optimizer, job.stop, self.keep, self.objective)
        self.rollouts = rollouts.of_run(job, self.parts, self.objective, self.recovery, self.partners)
        self._use_rows(recipe.data)
        self.ahead = Ahead(self._micro_batches)
        which = self.causal_lm.base_identity
        start = started_from(recipe, job.run_dir)
        facts = (recipe, len(job.data.train.lengths), len(job.data.eval.lengths), which, start)
        self.best_adapter = BestAdapter(job.model, job.base, job.tokenizer, *facts)
        of_data = job.data.content_fingerprint, job.data.older_fingerprint
        fingerprints = Fingerprints(job.base.fingerprint, job.data.fingerprint, which, *of_data)
        self.checkpointer = Checkpointer(job.run_dir, recipe, self.optimizer, fingerprints, job.stop, job.clock)
        self.at_start = health.fingerprints(self.optimizer.masters)
        self.spills = SpillWatch(job.device, job.sink)
        self.completed = RunState(loss_scale=loss_scale.of_new_run())  # the last state that may be saved

    def _use_rows(self, section: DataSection) -> None:
        """The rows to train and those to evaluate, packed or not."""
        of_step = (self.parts, self.objective, self.rollouts)
        self.batches = rows_of_run.batches_of(self.job, section, self.rollouts)
        self.evaluation = rows_of_run.evaluation_of(self.job, section, of_step, self.recovery, self.partners)

    def keep(self) -> None:
        self.checkpointer.save(self.completed, last_chance=True)

    def saved(self) -> str:
        """What of this run is on the disk, for an error."""
        step = self.checkpointer.saving.saved_step
        return f"step {step} is saved, mode='resume' goes on from it" if step > 0 else "nothing was saved yet"

    # --- before the first step -----------------------------------------------------------------------------------

    def begin(self, resume_from: Checkpoint | None) -> RunState:
        """Check the loss against the model's own, emit the plan, and put a checkpoint back."""
        if resume_from is not None:
            self.recovery.settings = self.recovery.settings.as_of(resume_from.state)
        self._apply(self.recovery.settings)
        with self.job.clock.phase("checks", "self-check"):
            check = selfcheck.run(self.causal_lm, self.parts, self.job.data.train, self.job.device)
        if check is not None and self.batches.data.packing and check.leak_message:
            self.sink.emit(Notice("packing", f"switched off: {check.leak_message}"))
            self._use_rows(self.batches.data.model_copy(update={"packing": False}))
        data, now = self.batches.data, self.recovery.settings
        self.partners.load(self.job, data, now)
        self.job = replace(self.job, data=reference.prepared(self.job, self.parts, data, self.partners, now))
        self._use_rows(data)
        if why := self.optimizer.moments.not_paged:
            self.sink.emit(Notice("optimizer", f"{self.train.optimizer}: {why}"))
        counts = self.job.model.get_nb_trainable_parameters()
        plan = self.batches.plan(self.recovery.settings, len(self.job.data.eval.lengths), *counts)
        promise, attends = determinism.promise(self.job.device), attention.shown(self.causal_lm)
        start = str(self.best_adapter.started_from or "") or None
        self.sink.emit(replace(plan, resume=promise, attention=attends, starts_from=start))
        if (steps := self.batches.steps) < schedule.FEW_STEPS:
            self.sink.emit(Notice("steps", f"only {steps} optimizer steps: little is learned in so few", steps))
        if resume_from is not None:
            self.completed = self._with_best(resume_from)
        self.checkpointer.check_room()
        self.partners.begin(self.job, plan.accumulation)
        return self.completed

    def _with_best(self, resume_from: Checkpoint) -> RunState:
        """Put a checkpoint back; what is not the best adapter as it was delivered is delivered again, or forgotten."""
        best, fault = resume_from.state.best_step, damage(self.job.run_dir / "adapter")
        if best is None or fault is None or self._deliver_again(resume_from.state, fault):
            return self.checkpointer.resume(resume_from)
        return replace(self.checkpointer.resume(resume_from), best_loss=None, best_step=None, evaluated_step=-1)

    def _deliver_again(self, state: RunState, fault: str, last_chance: bool = False) -> bool:
        """Deliver the best adapter from its step's checkpoint, in whose state the model is then; whether it was."""
        source, again = at_step(self.job.run_dir, state.best_step or 0), False
        if source is not None:  # which may have been saved by a stop, before it was evaluated
            best = replace(self.checkpointer.resume(source), eval_loss=state.best_loss, delivered=state.delivered)
            again = self._deliver(best, last_chance)
        outcome = "was delivered again" if again else "is in no checkpoint that is kept, and another takes its place"
        self.sink.emit(Notice("adapter", f"{fault}: the adapter of step {state.best_step} {outcome}"))
        return again

    def dry_run(self, state: RunState) -> None:
        """The longest micro-batch, an update, evaluation batch and drawing: what would fail late fails now."""
        if self.is_finished(state):
            return

        step = partial(self.dry_step, state)

        def work() -> None:
            with expert_check.watched(self.causal_lm):
                step()
            if self.evaluation is not None:
                self.evaluation.try_longest()

        restoring = partial(selfcheck.restoring_state, self.optimizer, self.job.device)
        with self.job.clock.phase("checks", "dry run"):
            self.recovery.run(state.step, partial(restoring, work), self.optimizer.zero_gradients)
            rollouts.try_longest(self.rollouts, state.step)
            restoring(partial(compiled.settle, self.causal_lm, step, self.batches.layout.width, self.sink))
        if self.recovery.settings.offloaded:
            self.sink.emit(Notice("memory", self.pool.said))

    def dry_step(self, state: RunState) -> None:
        micro = self.recovery.settings.micro_batch_size
        # Twice, as in a step of several micro-batches: the second one finds the gradients of the first.
        batches = [self.batches.longest(micro)] * min(2, math.ceil(self.batches.batch_size / micro))
        self._gather_gradient(state, batches, 1.0)
        self.optimizer.clip(self.optimizer.gradient_norm(), self.train.max_grad_norm)
        self.optimizer.step(0.0)

    def evaluate_baseline(self, state: RunState) -> RunState:
        """Ask the untuned model the sample and exact-match questions; measure its loss when nothing is trained yet."""
        if self.evaluation is None or self.is_finished(state):
            return state
        self.evaluation.sample_baseline(state.step)
        if state.step > 0:
            return state
        matches = self.evaluation.exact_match(state.step)
        loss = self.evaluation.loss(state.step)
        self.evaluation.emit_eval(0, loss, matches, best=False)
        return replace(state, exact_match_before=matches, eval_loss=loss)

    # --- the step ------------------------------------------------------------------------------------------------

    def step(self, state: RunState) -> RunState:
        """One optimizer step, or, when its numbers are not finite, none."""
        started = time.monotonic()
        packs = self.batches.order.packs_of_step(state.step)
        state = self.rollouts.before(state, packs) if self.rollouts else state
        lengths = self.batches.lengths(packs)
        cut = self.partners.cut(state, lengths, self.recovery.settings)
        batches = self.ahead.take((tuple(packs), cut))
        step_weight = sum(self.objective.weight(batch) for batch in batches)

        def work(now: Cut) -> list[torch.Tensor]:
            fitting = batches if now == cut else self._micro_batches((packs, now))
            return self._gather_gradient(state, fitting, step_weight)

        gather = lambda: self.partners.gather(state, lengths, self.recovery.settings, work)  # noqa: E731
        losses = self.recovery.run(state.step + 1, gather, self.optimizer.zero_gradients)
        if state.step + 1 < self.batches.steps and not self.rollouts:  # a GPU is still at this one
            self.ahead.prepare(sharing.following(self.partners.cut, self.batches, state, self.recovery.settings))
        self.optimizer.unscale(loss_scale.factor_of(state.loss_scale))
        norm = self.optimizer.gradient_norm()
        # The one question that a step asks the device: is all of it finite? Only then does the update happen.
        mean = torch.stack(losses).sum() / max(step_weight, 1e-9)
        loss_value, norm_value = (float(value) for value in torch.stack([mean, norm]).tolist())
        progress = schedule.progress_of(state.step, self.batches.steps, state.seconds, self.train)
        rate = schedule.learning_rate(progress, self.train)
        is_finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if math.isfinite(loss_value) and not is_finite and (smaller := loss_scale.halved(state.loss_scale)):
            self.optimizer.zero_gradients()
            self.sink.emit(Recovered(state.step + 1, smaller.why))
            return self.step(replace(state, loss_scale=smaller))
        if is_finite:
            self.partners.update(rate)
            self.optimizer.clip(norm, self.train.max_grad_norm)
            self.recovery.run_once(lambda: self.optimizer.step(rate))
        else:
            self._skip(state, losses, packs, self.partners.cut(state, lengths, self.recovery.settings))
        epoch, numbers = self.batches.order.epoch_of_step(state.step + 1), (loss_value, rate, norm_value)
        tokens = (self.batches.tokens(packs), sum(int(batch.trained_T.numel()) for batch in batches))
        done = step_done((state.step + 1, epoch), numbers, tokens, time.monotonic() - started, self.job.device)
        self.spills.after_step(done)
        state = self.recovery.settings.kept_in(health.after_step(state, done, is_finite, self.sink))
        state = self.partners.after_step(state, self.recovery.settings)
        self.completed = state
        if state.skipped_in_a_row >= health.SKIPS_BEFORE_STOPPING:
            self.checkpointer.save(state, last_chance=True)
            raise health.too_many_skips(state)
        if is_finite:
            self.sink.emit(done)
            rollouts.emit(self.rollouts, self.objective, done.step, self.sink)
        return state

    def _micro_batches(self, wanted: tuple[Sequence[Pack], Cut]) -> list[Batch]:
        """Packs in micro-batches."""
        return [in_one_block(batch, self.job.device) for batch in self.batches.micro_batches(*wanted)]

    def _gather_gradient(self, state: RunState, batches: Sequence[Batch], step_weight: float) -> list[torch.Tensor]:
        """Forward and backward of each micro-batch; each one's summed loss, still on the device."""
        work = partial(self._micro_steps, state, batches, step_weight / loss_scale.factor_of(state.loss_scale))
        return determinism.exactly(work, self.optimizer.zero_gradients, self.job.device, self.sink)

    def _micro_steps(self, state: RunState, batches: Sequence[Batch], step_weight: float) -> list[torch.Tensor]:
        preferences.begin(self.objective, batches, self.job.model, self.parts, self.partners.shared)
        self.job.model.train()
        parts, losses = self.rollouts.parts if self.rollouts else self.parts, []
        for micro_step, batch in enumerate(batches):
            self.job.stop.check()
            if batch.trained_T.numel() == 0 or not self.partners.mine(micro_step):
                losses.append(torch.zeros((), device=self.job.device))  # it adds nothing to loss nor gradient here
                continue
            seed_micro_batch(self.train.seed, state.step, micro_step)
            placed = batch.to(self.job.device)
            share = (self.objective, step_weight, self.train.neftune_alpha)
            losses.append(forward_backward(parts, placed, *share))
        self.job.stop.check()
        return losses

    def _skip(self, state: RunState, losses: Sequence[torch.Tensor], packs: Sequence[Pack], cut: Cut) -> None:
        self.optimizer.zero_gradients()
        micro_batches = self.batches.in_micro_batches(packs, cut)
        rows = health.rows_behind(torch.stack(list(losses)).tolist(), micro_batches, self.job.data.train)
        message = f"loss or gradient not finite: step skipped, weights unchanged; its rows: {rows}"
        self.sink.emit(Recovered(state.step + 1, message))

    # --- between steps -------------------------------------------------------------------------------------------

    def is_finished(self, state: RunState) -> bool:
        out_of_time = self.train.max_minutes is not None and state.seconds >= 60 * self.train.max_minutes
        return state.step >= self.batches.steps or state.stopped_early or out_of_time

    def evaluation_is_due(self, state: RunState) -> bool:
        if self.evaluation is None or state.step in (0, state.evaluated_step):
            return False
        return state.step % self.job.recipe.eval.every_steps == 0 or self.is_finished(state)

    def evaluate(self, state: RunState) -> RunState:
        """Measure, deliver the adapter when it is the best so far, and decide whether it is time to stop."""
        assert self.evaluation is not None
        loss = self.evaluation.loss(state.step)
        answers = self.evaluation.sample_answers(state.step)
        evaluated = with_evaluation(state, loss, self.job.recipe.eval.early_stopping_patience)
        best = evaluated.evaluations_without_improvement == 0
        self.evaluation.emit_eval(state.step, loss, None, best)
        self.evaluation.emit_samples(state.step, answers)
        if best:
            known = self.evaluation.delivered
            bettered = replace(evaluated, best_loss=loss, best_step=state.step, delivered=known)
            # What could not be written is not the best: what is delivered at the end must be on the disk.
            if self._deliver(bettered):
                evaluated = bettered
        self.completed = evaluated
        return evaluated

    def _deliver(self, state: RunState, last_chance: bool = False) -> bool:
        """Write the adapter that the model has now; whether it was written."""
        publish = partial(self.best_adapter.publish, self.job.run_dir, state, self.sink)
        return self.checkpointer.deliver(publish, state.step, last_chance)

    def stopped(self) -> StoppedBySignal:
        """Leave by a signal: the last completed step is saved, the gradient of an unfinished one is not."""
        state, stop = self.completed, self.job.stop
        self.optimizer.zero_gradients()
        try:
            self.checkpointer.save(state, last_chance=True)
        except TrainingStopped as error:
            return stop.error(error.what, error.hint)
        self.sink.emit(self.end("stopped"))
        if state.step == 0:
            hint = "run the same command with mode='resume' or mode='fresh'"
            return stop.error("no step was finished, nothing to save", hint)
        return stop.error(f"saved after step {state.step} of {self.batches.steps}", "continue with mode='resume'")

    # --- the end -------------------------------------------------------------------------------------------------

    def finish(self, state: RunState) -> RunState:
        """Save, put the best adapter back into the model, measure what is delivered, and say how it ended."""
        self.checkpointer.save(state, last_chance=True)
        health.check_moved(self.optimizer, self.at_start, state.step)
        if state.skipped:
            self.sink.emit(Notice("steps", "steps skipped, their numbers were not finite", state.skipped))
        self.job.watch.report(self.sink)
        if state.best_step is not None and (fault := damage(self.job.run_dir / "adapter")):
            state = state if self._deliver_again(state, fault, last_chance=True) else replace(state, best_step=None)
        # An earlier process that was killed may have saved a better adapter than this checkpoint records.
        on_disk = delivered_step(self.job.run_dir)
        if self.evaluation is None or state.best_step is None or on_disk is None:
            self._deliver(state, last_chance=True)
            delivered = state.step
        else:
            delivered = on_disk
            if delivered != state.step:
                adapters.load_into(self.job.model, self.job.run_dir / "adapter")
            if self.job.recipe.eval.exact_match_rows:
                matches = self.evaluation.exact_match(state.step)
                self.evaluation.emit_eval(delivered, state.best_loss, matches, best=True)
                state = replace(state, exact_match_after=matches, eval_loss=state.best_loss)
                self._deliver(replace(state, step=delivered), last_chance=True)
        steps_left = state.step < self.batches.steps
        reason = "early stopping" if state.stopped_early else "time limit" if steps_left else "finished"
        self.sink.emit(self.end(reason, state, delivered))
        return state

    def end(self, reason: str, state: RunState | None = None, delivered: int | None = None) -> End:
        said = (reason, self.batches.steps, delivered)
        return ended(self.job, state or self.completed, self.optimizer, self.recovery.settings, said)

    # --- memory --------------------------------------------------------------------------------------------------

    def _apply(self, now: MemorySettings) -> None:
        """Take over the settings that memory decides about: at the start, and whenever it has run out."""
        self.checkpointer.saving.settle()  # a state that is being written has a copy in memory
        weight_moving.move(self.causal_lm, now.place, self.job.device, self.sink)
        dropout = self.job.recipe.lora.dropout > 0
        inputs = offload.held_by(self.pool, now.offloaded, len(recomputable(self.causal_lm)))
        set_gradient_checkpointing(self.causal_lm, now.gradient_checkpointing, dropout, inputs=inputs)
