"""What the processes beside the first do: load the same run, compute their part of each step, make the same update.

They read rows and base by themselves, after process 0 has, so that both lie in the caches of this machine. They never
touch the run's folder: its state comes from process 0, and so does every decision. What goes wrong here is shown where
gradients are summed (`training/processes.py`), and said by this process, in two lines.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from qlora import dealing, determinism, heap, loss_scale, numerics, processes
from qlora.data.prepare import PreparedData
from qlora.device import release_memory
from qlora.errors import ModelError, QloraError, RunFolderError, TrainingStopped
from qlora.events import Sinks
from qlora.foreign_json import checked
from qlora.guarded import Attempt, Guarded
from qlora.loss_scale import LossScale
from qlora.memory.changes import changed
from qlora.model import compiled
from qlora.model.resolve import resolve
from qlora.model.tokenizer_files import TokenizerFiles
from qlora.model.weight_receiving import Place
from qlora.numerics import Numerics
from qlora.recipe.reading import Recipe
from qlora.stop import StopAsked, StopRequest
from qlora.study.material import Found
from qlora.training import dividing, exchanging, handing, reference, selfcheck
from qlora.training.answered import Answer
from qlora.training.channel import Channel
from qlora.training.checkpoint import RunState
from qlora.training.dividing import FINE, Word
from qlora.training.exchanging import Sums
from qlora.training.handing import Handed
from qlora.training.loop import Training
from qlora.training.processes import Follower
from qlora.training.rollouts import Rollouts
from qlora.training.setup import Job, prepare_job
from qlora.training.sharing import Stopwatch
from qlora.training.step_batches import Pack

_WHERE = {True: "host", False: "device"}  # embeddings, as a recipe says it
NOWHERE = Path("/nonexistent")  # a follower's run folder: nothing is read or written there


def follow(channel: Channel, stop: StopRequest) -> None:
    """All that this process does of a run, until process 0 says that it is over. Raises what `qlora.errors` has."""
    word = channel.tell(None)
    if word["do"] != "begin":
        return
    recipe = _recipe(word)
    handed = handing.taken(channel, recipe, word["study"])
    with ExitStack() as stack:
        code = 1  # of what is no error of ours
        try:
            training = stack.enter_context(_loaded(channel, word, recipe, handed, stop))
            code = FINE
        except QloraError as error:
            code = error.exit_code
            raise
        finally:
            if code != FINE:
                _confess(channel, code)
        _follow(channel, training)


def _confess(channel: Channel, code: int) -> None:
    """Show that the run was not loaded, as soon as process 0 asks."""
    while (word := channel.tell(None))["do"] in ("judged", "settle"):
        if word["do"] == "judged":
            handing.taken_reference(channel, word)
    if word["do"] == "state":
        exchanging.show_failure(channel, code, word["parameters"])
    elif word["do"] == "serve":
        channel.gathers.fail(code)


@contextmanager
def _loaded(
    channel: Channel, word: Word, recipe: Recipe, handed: Handed | None, stop: StopRequest
) -> Iterator[Following]:
    """The same rows and the same base with adapters, as process 0 has them."""
    sink = Sinks()
    numbers = checked(Numerics, word["numerics"], "process 0")
    with determinism.for_run(recipe.train.deterministic, sink), numerics.in_force(numbers):
        base = resolve(recipe.model.base, word["commit"] or recipe.model.revision, sink)
        if base.fingerprint != word["base"]:
            raise ModelError(f"{channel.place}: {base.name} is another base here", "give every machine the same files")
        tokenizer = TokenizerFiles({name: b64decode(data) for name, data in word["tokenizer"].items()})
        with prepare_job(recipe, NOWHERE, Found(base, None, lesson=handed), tokenizer, sink, stop) as job:
            if job.data.fingerprint != word["rows"]:
                what = f"{channel.place}: the rows of [[data.train]] or [[data.eval]] are others here"
                raise RunFolderError(what, "give every machine the same files, under the same paths")
            with Guarded("setting up the optimizer", "lower lora.r"):
                training = Following(job, channel, word)
            try:
                with stop.being_read(), training.ahead:
                    yield training
            finally:
                training.optimizer.detach()


def _recipe(word: Word) -> Recipe:
    """The run's, as it concerns a follower: nothing to begin with, to keep or to export, and memory as decided."""
    recipe = Recipe.model_validate(word["recipe"])
    settings = word["settings"][processes.of_run().rank]
    values: dict[str, Any] = {
        f"train.{name}": settings[name] for name in ("micro_batch_size", "gradient_checkpointing")
    }
    place = settings["place"]
    values |= {"memory.offload_activations": settings["offload_activations"]}
    values |= {"memory.stream_weights": place["streams"], "memory.embedding": _WHERE[place["host_embedding"]]}
    values |= {"lora.from_adapter": None, "lora.init": "default", "export.formats": (), "report.sinks": ()}
    if word["limit"]:
        values["memory.limit"] = f"{word['limit']}B"
    return changed(recipe, values)


class Following(Training):
    """A run whose steps are asked for."""

    def __init__(self, job: Job, channel: Channel, word: Word) -> None:
        super().__init__(job)
        assert isinstance(self.partners, Follower)
        self.channel, self.follower, self.is_compiled = channel, self.partners, False
        self._drawn: list[Answer] = []  # and not judged yet
        self._use_rows(job.recipe.data.model_copy(update={"packing": word["packing"]}))
        self._apply(self.recovery.settings)
        self._take(word)

    def settle(self, word: Word) -> None:
        """What process 0's checks have changed since it began."""
        self._use_rows(self.job.recipe.data.model_copy(update={"packing": word["packing"]}))
        self._take(word)

    def take_state(self, word: Word) -> None:
        try:
            self._take_numbers(checked(Numerics, word["numerics"], "process 0"))
            if word["trained"] != exchanging.trained(self.optimizer):
                what = f"{self.channel.place}: what is trained here has other names or shapes than in process 0"
                raise TrainingStopped(what, "give every machine the same versions of qlora, transformers and peft")
        except QloraError as error:
            exchanging.show_failure(self.channel, error.exit_code, word["parameters"])
            raise
        exchanging.shown(self.channel, self.optimizer, FINE, step=1)
        exchanging.copy_state(self.channel, self.optimizer, word["counters"])

    def _take_numbers(self, numbers: Numerics) -> None:
        """What process 0 has found out since it began: whether layers are compiled, and whether kernels are exact."""
        before = numerics.of_run()
        numerics.correct(numbers)
        if before is not None and before.deterministic and numbers.deterministic is False:
            torch.use_deterministic_algorithms(False)
        if numbers.compiled and not self.is_compiled:
            step = partial(self.dry_step, RunState(loss_scale=loss_scale.of_new_run()))
            settle = partial(compiled.settle, self.causal_lm, step, self.batches.layout.width, self.sink)
            selfcheck.restoring_state(self.optimizer, self.job.device, settle)
            self.is_compiled = True

    def take_judged(self, word: Word) -> None:
        """The rows as an objective of preference needs them, with what the reference said of them."""
        found = handing.taken_reference(self.channel, word)
        self.job = replace(self.job, data=reference.given(self._judged, found))
        self._use_rows(self.batches.data)

    @cached_property
    def _judged(self) -> PreparedData:
        return reference.judged(self.job.data, self.batches.data, self.train.objective)

    def take_part(self, word: Word) -> None:
        """In what is neither a step nor its update: an evaluation, answers, what the reference says."""
        self._take(word)
        with ExitStack() as stack, heap.another_phase():
            if word.get("weights"):
                stack.enter_context(reference.afterwards_as_now(self.job.model))
                exchanging.copy_weights(self.channel, self.optimizer)
            self._do_part(word)

    def _do_part(self, word: Word) -> None:
        with Attempt(), suppress(StopAsked), self.follower.dealt():
            if self.rollouts is not None and word["do"] in ("draw", "recall", "judge"):
                self._draw_part(self.rollouts, word)
            elif word["do"] == "reference":
                asked = reference.AskedOf(
                    word["split"], reference.splits_of(self._judged)[word["split"]], word["as_it_is"]
                )
                reference.answers(self.job, self.parts, self.batches.data, asked, self.partners)
            elif self.evaluation is not None and word["do"] == "answer":
                self.evaluation.answers(word["count"], word["untuned"], word["limit"])
            elif self.evaluation is not None:
                self.evaluation.losses(self.evaluation.rows())
            return
        self._let_go()

    def _draw_part(self, drawing: Rollouts, word: Word) -> None:
        if word["do"] == "draw":
            self._drawn = drawing.draw(word["first"], word["rows"])
        elif word["do"] == "judge":
            drawing.answer_questions()
        else:
            with nullcontext() if word["as_it_is"] else self.job.model.disable_adapter():
                drawing.logprobs(self._drawn)

    def take_answers(self, word: Word) -> None:
        """What was drawn, with what process 0 knows of it."""
        assert self.rollouts is not None
        self.rollouts.hold(word["first"], handing.taken_answers(self.channel, word, self.rollouts.prompt_of))

    def compute(self, word: Word) -> torch.Tensor | None:
        """Our part of a step, and then the whole gradient with its norm; None where the step is not done."""
        scale = None if word["scale"] is None else checked(LossScale, word["scale"], "process 0")
        state = RunState(step=word["step"], loss_scale=scale)
        self._take(word)
        self.optimizer.zero_gradients()
        shares = checked(dealing.Shares, word["shares"], "process 0")
        packs, cut = self._dealt(state.step, shares)
        batches, self.follower.owners = self.ahead.take((packs, cut)), cut.owners
        step_weight = sum(self.objective.weight(batch) for batch in batches)
        losses, found, watch = None, None, Stopwatch(self.job.device, word["measures"])
        work = partial(self._gather_gradient, state, batches, step_weight)
        with suppress(StopAsked), self.follower.dealt():
            losses, found, _ = dividing.shown(
                self.channel.gathers.shared(partial(watch.during, work)),
                lambda code: exchanging.shown(self.channel, self.optimizer, code, state.step, watch.took),
            )
        if losses is None or found is None or found.worst[1] != FINE:
            self._let_go()
            return None
        if state.step + 1 < self.batches.steps and not self.rollouts:
            self.ahead.prepare(self._dealt(state.step + 1, shares))
        sums = Sums.of(self.objective)
        exchanging.add_up(self.channel, self.optimizer, torch.stack(losses), found.complete, sums)
        self.optimizer.unscale(loss_scale.factor_of(scale))
        return self.optimizer.gradient_norm()

    def update(self, norm: torch.Tensor, rate: float) -> None:
        self.optimizer.clip(norm, self.train.max_grad_norm)
        self.optimizer.step(rate)

    def _let_go(self) -> None:
        self.optimizer.zero_gradients()
        self.recovery.free()
        release_memory(self.job.device)

    def _dealt(self, step: int, shares: dealing.Shares) -> tuple[tuple[Pack, ...], dealing.Cut]:
        """The packs of a step, and who computes which of them."""
        packs = tuple(self.batches.order.packs_of_step(step))
        return packs, dealing.dealt(self.batches.lengths(packs), shares)

    def _take(self, word: Word) -> None:
        """Our settings as process 0 has them, where they are others now."""
        told = word["settings"][self.channel.place.rank]
        settings = replace(self.recovery.settings, **{**told, "place": Place(**told["place"])})
        if settings != self.recovery.settings:
            self.recovery.settings = settings
            self._apply(settings)


def _follow(channel: Channel, training: Following) -> None:
    norm: torch.Tensor | None = None
    with Guarded("training", "lower data.max_length or lora.r, or use a smaller base"):
        while (word := channel.tell(None))["do"] != "end":
            if word["do"] == "serve":
                channel.gathers.answer()
            elif word["do"] == "settle":
                training.settle(word)
            elif word["do"] == "state":
                training.take_state(word)
            elif word["do"] == "judged":
                training.take_judged(word)
            elif word["do"] == "answers":
                training.take_answers(word)
            elif word["do"] == "step":
                norm = training.compute(word)
            elif word["do"] != "update":
                training.take_part(word)
            elif norm is not None:
                training.update(norm, word["rate"])
