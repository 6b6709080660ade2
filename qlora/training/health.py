"""Is the run well? Losses that jump, rows behind numbers that are not finite, adapters that never moved.

Whether numbers are finite is asked before every update, on the loss and the norm of the whole gradient: what is not
finite anywhere shows in one of the two, and then nothing of the step reaches the weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora import loss_scale
from qlora.data.token_cache import PreparedSplit
from qlora.errors import TrainingStopped
from qlora.events import Notice, Sink, StepDone
from qlora.step.optimizer import AdapterOptimizer
from qlora.training.checkpoint import RunState

SKIPS_BEFORE_STOPPING = 3  # non-finite steps in a row
NAMED_ROWS = 20  # `file:line` in a message; the count says how many more

# A spike is a loss far above its recent course. 6 mean deviations and 30 %: none in the 378 steps of the quickstart,
# where the largest rise is 2.7 deviations while the loss falls from 3.3 to 0.05.
TREND_DECAY = 0.95
TREND_STEPS = 20
SPIKE_DEVIATIONS = 6.0
SPIKE_SHARE = 1.3


@dataclass(frozen=True)
class Trend:
    """The course of the loss: its moving mean and mean deviation over about 20 steps."""

    mean: float = 0.0
    spread: float = 0.0
    seen: int = 0

    def is_spike(self, loss: float) -> bool:
        if self.seen < TREND_STEPS:
            return False
        return loss > self.mean + SPIKE_DEVIATIONS * self.spread and loss > SPIKE_SHARE * self.mean

    def after(self, loss: float) -> Trend:
        """With one more loss. A spike counts like any other: a loss that stays high is the new course."""
        if self.seen == 0:
            return Trend(loss, 0.0, 1)
        spread = TREND_DECAY * self.spread + (1 - TREND_DECAY) * abs(loss - self.mean)
        return Trend(TREND_DECAY * self.mean + (1 - TREND_DECAY) * loss, spread, self.seen + 1)


def after_step(state: RunState, done: StepDone, is_finite: bool, sink: Sink) -> RunState:
    """The state with one more step behind it, done or skipped; a loss that leaves its course is a notice."""
    state = replace(
        state,
        step=done.step,
        tokens=state.tokens + done.tokens,
        trained_tokens=state.trained_tokens + done.trained_tokens,
        seconds=state.seconds + done.seconds,
        skipped=state.skipped + (not is_finite),
        loss_scale=loss_scale.after_update(state.loss_scale) if is_finite else state.loss_scale,
        skipped_in_a_row=0 if is_finite else state.skipped_in_a_row + 1,
    )
    if not is_finite:
        return state
    trend = Trend(state.loss_trend, state.loss_spread, state.losses_seen)
    if trend.is_spike(done.loss):
        times = done.loss / max(trend.mean, 1e-9)
        sink.emit(Notice("loss", f"spike at step {state.step}: {done.loss:.3f}, {times:.1f} times its course"))
    trend = trend.after(done.loss)
    return replace(state, train_loss=done.loss, loss_trend=trend.mean, loss_spread=trend.spread, losses_seen=trend.seen)


def too_many_skips(state: RunState) -> TrainingStopped:
    return TrainingStopped(
        f"step {state.step}: loss or gradient was not finite {state.skipped_in_a_row} times in a row",
        "lower train.learning_rate; the weights of the last good step are in the newest checkpoint",
    )


def rows_behind(
    losses: Sequence[float], micro_batches: Sequence[Sequence[tuple[int, ...]]], split: PreparedSplit
) -> str:
    """`file:line` of the rows of the micro-batches with a loss that is not finite; of all where only a gradient is."""
    bad = [packs for loss, packs in zip(losses, micro_batches, strict=True) if not math.isfinite(loss)]
    wheres = [split.wheres[row] for packs in (bad or micro_batches) for pack in packs for row in pack]
    more = f" and {len(wheres) - NAMED_ROWS} more" if len(wheres) > NAMED_ROWS else ""
    return ", ".join(wheres[:NAMED_ROWS]) + more


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """A sha256 of each tensor's bits, one at a time on the host; the fp32 masters of rank 16 on an 8B model: 168 MB."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data).digest()
        for name, tensor in tensors.items()
    }


def check_moved(optimizer: AdapterOptimizer, at_start: Mapping[str, bytes], steps: int) -> None:
    """Each adapted module had a gradient, and its weights are not those it began with. Raises TrainingStopped.

    An inert adapter looks like any other in a folder, and its model like the untuned one: nobody would notice.
    """
    now = fingerprints(optimizer.masters)
    norms = dict(zip(optimizer.masters, optimizer.largest_gradients.tolist(), strict=True))
    modules: dict[str, list[str]] = {}
    for name in optimizer.masters:
        modules.setdefault(module_of(name), []).append(name)
    without = [module for module, names in modules.items() if not any(norms[name] > 0 for name in names)]
    still = [module for module, names in modules.items() if all(now[name] == at_start[name] for name in names)]
    if inert := sorted({*without, *still}):
        why = "never had a gradient" if inert[0] in without else "did not move"
        hint = "leave them out of lora.target_modules, or report this base; the run's state is saved"
        if len(without) == len(modules):  # so it is where all answers of grpo were worth the same
            hint = "look at the rows, at train.rewards or train.learning_rate: no step said what to change"
        raise TrainingStopped(
            f"{len(inert)} of {len(modules)} adapted modules learned nothing in {steps} steps: {inert[0]} {why}", hint
        )


def module_of(parameter: str) -> str:
    """The adapted layer that a parameter belongs to, by its name in the base."""
    name = parameter.removeprefix("base_model.model.")
    return name.partition(".lora_")[0].partition(".modules_to_save")[0]
