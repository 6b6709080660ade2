"""What is said at the end of a step, and at that of a training: figures, totals, predicted memory beside measured."""

from __future__ import annotations

import torch

from qlora.events import End, StepDone
from qlora.memory.measured import measure, peak_bytes
from qlora.step.optimizer import AdapterOptimizer
from qlora.training.checkpoint import RunState
from qlora.training.memory_plan import MemorySettings, compare
from qlora.training.setup import Job

_OF_STATE = ("step", "seconds", "tokens", "trained_tokens", "train_loss", "eval_loss")


def ended(
    job: Job,
    state: RunState,
    optimizer: AdapterOptimizer,
    settings: MemorySettings,
    said: tuple[str, int, int | None],
) -> End:
    """`said`: why it ended, how many steps there were to be, and whose adapter is delivered where that is known."""
    reason, steps, delivered = said
    folder = job.run_dir / "adapter"
    return End(
        reason=reason,
        steps=steps,
        **{name: getattr(state, name) for name in _OF_STATE},
        exact_match_before=state.exact_match_before,
        exact_match_after=state.exact_match_after,
        peak_bytes=peak_bytes(job.device),
        adapter=str(folder) if folder.is_dir() else None,
        adapter_step=delivered if delivered is not None else state.best_step,
        memory=compare(settings, measure(job.model, optimizer, job.device)),
        phases={name: round(seconds, 3) for name, seconds in job.clock.seconds.items()},
    )


def step_done(
    at: tuple[int, float],
    numbers: tuple[float, float, float],
    tokens: tuple[int, int],
    seconds: float,
    device: torch.device,
) -> StepDone:
    """A step's number and epoch; its loss, learning rate and gradient norm; its tokens, and those that were trained."""
    (step, epoch), (loss, rate, norm), (read, trained) = at, numbers, tokens
    return StepDone(
        step=step,
        epoch=epoch,
        loss=loss,
        learning_rate=rate,
        grad_norm=norm,
        tokens=read,
        trained_tokens=trained,
        tokens_per_second=read / seconds,
        peak_bytes=peak_bytes(device),
        seconds=seconds,
    )
