"""What the processes beside the first do: load the same run, compute their part of each step, make the same update.

They read rows and base by themselves, after process 0 has, so that both lie in the caches of this machine. They never
touch the run's folder: its state comes from process 0, and so does every decision. What goes wrong here is shown where
gradients are summed (`training/processes.py`), and said by this process, in two lines.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora import determinism, loss_scale, numerics
from qlora.device import release_memory
from qlora.errors import ModelError, QloraError, RunFolderError, TrainingStopped
from qlora.events import Sinks
from qlora.foreign_json import checked
from qlora.guarded import Attempt, Guarded
from qlora.loss_scale import LossScale
from qlora.memory.changes import changed
from qlora.model.resolve import resolve
from qlora.model.tokenizer_files import TokenizerFiles
from qlora.model.weight_receiving import Place
from qlora.numerics import Numerics
from qlora.recipe.reading import Recipe
from qlora.stop import StopAsked, StopRequest
from qlora.study.material import Found
from qlora.training.checkpoint import RunState
from qlora.training.loop import Training
from qlora.training.processes import (
    FINE,
    NO_MEMORY,
    STOP,
    Channel,
    add_up,
    copy_state,
    show_failure,
    shown,
    trained,
)
from qlora.training.setup import Job, prepare_job
from qlora.training.words import Word

NOWHERE = Path("/nonexistent")  # a follower's run folder: nothing is read or written there


def follow(channel: Channel, stop: StopRequest) -> None:
    """All that this process does of a run, until process 0 says that it is over. Raises what `qlora.errors` has."""
    word = channel.tell(None)
    if word["do"] != "begin":
        return
    with ExitStack() as stack:
        code = 1  # of what is no error of ours
        try:
            training = stack.enter_context(_loaded(channel, word, stop))
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
    while (word := channel.tell(None))["do"] == "settle":
        pass
    if word["do"] == "state":
        show_failure(channel, code, word["parameters"])
    elif word["do"] == "serve":
        channel.gathers.fail(code)


@contextmanager
def _loaded(channel: Channel, word: Word, stop: StopRequest) -> Iterator[Following]:
    """The same rows and the same base with adapters, as process 0 has them."""
    recipe, sink = _recipe(word), Sinks()
    numbers = checked(Numerics, word["numerics"], "process 0")
    with determinism.for_run(recipe.train.deterministic, sink), numerics.in_force(numbers):
        base = resolve(recipe.model.base, word["commit"] or recipe.model.revision, sink)
        if base.fingerprint != word["base"]:
            raise ModelError(f"{channel.place}: {base.name} is another base here", "give every machine the same files")
        tokenizer = TokenizerFiles({name: b64decode(data) for name, data in word["tokenizer"].items()})
        with prepare_job(recipe, NOWHERE, Found(base, None), tokenizer, sink, stop) as job:
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
    settings = word["settings"]
    values: dict[str, Any] = {
        f"train.{name}": settings[name] for name in ("micro_batch_size", "gradient_checkpointing")
    }
    values |= {"memory.offload_activations": settings["offload_activations"]}
    values |= {"lora.from_adapter": None, "lora.init": "default", "export.formats": (), "report.sinks": ()}
    if word["limit"]:
        values["memory.limit"] = f"{word['limit']}B"
    return changed(recipe, values)


class Following(Training):
    """A run whose steps are asked for."""

    def __init__(self, job: Job, channel: Channel, word: Word) -> None:
        super().__init__(job)
        self.channel = channel
        self._use_rows(job.recipe.data.model_copy(update={"packing": word["packing"]}))
        self._apply(self.recovery.settings)
        self._take(word["settings"])

    def settle(self, word: Word) -> None:
        """What process 0's checks have changed since it began."""
        numerics.correct(checked(Numerics, word["numerics"], "process 0"))
        self._use_rows(self.job.recipe.data.model_copy(update={"packing": word["packing"]}))
        self._take(word["settings"])

    def take_state(self, word: Word) -> None:
        if word["trained"] != trained(self.optimizer):
            show_failure(self.channel, TrainingStopped.exit_code, word["parameters"])
            what = f"{self.channel.place}: what is trained here has other names or shapes than in process 0"
            raise TrainingStopped(what, "give every machine the same versions of qlora, transformers and peft")
        shown(self.channel, self.optimizer, FINE, step=1)
        copy_state(self.channel, self.optimizer, word["counters"])

    def compute(self, word: Word) -> torch.Tensor | None:
        """Our part of a step, and then the whole gradient with its norm; None where the step is not done."""
        scale = None if word["scale"] is None else checked(LossScale, word["scale"], "process 0")
        state = RunState(step=word["step"], loss_scale=scale)
        self._take(word["settings"])
        self.optimizer.zero_gradients()
        packs, micro = tuple(self.batches.order.packs_of_step(state.step)), self.recovery.settings.micro_batch_size
        losses, code = None, 1
        try:
            batches = self.ahead.take((packs, micro))
            step_weight = sum(self.objective.weight(batch) for batch in batches)
            with self.channel.gathers.session(), Attempt():
                losses, code = self._gather_gradient(state, batches, step_weight), FINE
            code = NO_MEMORY if losses is None else code
        except StopAsked:
            code = STOP
        except QloraError as error:
            code = error.exit_code
            raise
        finally:
            found = shown(self.channel, self.optimizer, code, state.step)
        if losses is None or found.worst[1] != FINE:
            self._let_go()
            return None
        if state.step + 1 < self.batches.steps:
            self.ahead.prepare((tuple(self.batches.order.packs_of_step(state.step + 1)), micro))
        add_up(self.channel, self.optimizer, torch.stack(losses), found.complete)
        self.optimizer.unscale(loss_scale.factor_of(scale))
        return self.optimizer.gradient_norm()

    def update(self, norm: torch.Tensor, rate: float) -> None:
        self.optimizer.clip(norm, self.train.max_grad_norm)
        self.optimizer.step(rate)

    def _let_go(self) -> None:
        self.optimizer.zero_gradients()
        self.recovery.free()
        release_memory(self.job.device)

    def _take(self, told: Word) -> None:
        """Process 0's settings, where they are others now."""
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
            elif word["do"] == "step":
                norm = training.compute(word)
            elif norm is not None:
                training.update(norm, word["rate"])
