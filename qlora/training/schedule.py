"""Arithmetic of a run: rows per step, learning rate of each step, when a checkpoint is due. Pure functions."""

from __future__ import annotations

import math

from qlora.recipe.sections import CheckpointSection, TrainSection

LARGEST_AUTO_BATCH = 16
FEWEST_AUTO_STEPS = 100
FEW_STEPS = 50
DEFAULT_EPOCHS = 3.0


def auto_batch_size(packs_per_epoch: int, train: TrainSection) -> int:
    """Rows per step: the recipe's, or the largest up to 16 that leaves at least 100 steps (never less than one).

    With `max_steps` the number of steps is given: then the largest that reads the rows about three times.
    """
    if isinstance(train.batch_size, int):
        return train.batch_size
    epochs = train.epochs if train.max_steps is None and train.epochs else DEFAULT_EPOCHS
    steps = train.max_steps or FEWEST_AUTO_STEPS
    fitting = int(packs_per_epoch * epochs) // steps
    batch = max(1, min(LARGEST_AUTO_BATCH, fitting))
    micro = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    return max(batch // micro * micro, micro)


def learning_rate(progress: float, train: TrainSection) -> float:
    """Rate at `progress` (0 to 1) of the run: linear warm-up from 0, then the recipe's course down to 0.

    Cosine without restarts (Loshchilov & Hutter 2017, eq. 5 with eta_min 0).
    """
    if progress < train.warmup_ratio:
        return train.learning_rate * progress / train.warmup_ratio
    if train.lr_scheduler == "constant":
        return train.learning_rate
    rest = min(1.0, (progress - train.warmup_ratio) / (1.0 - train.warmup_ratio))
    if train.lr_scheduler == "linear":
        return train.learning_rate * (1.0 - rest)
    return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * rest))


def progress_of(step: int, steps: int, seconds: float, train: TrainSection) -> float:
    """Progress of the update numbered `step` (from 0), counted at its end so that the first rate is not 0.

    With `max_minutes` the clock counts too, so that the schedule ends when the time does.
    """
    by_steps = (step + 1) / (steps + 1)
    if train.max_minutes is None:
        return by_steps
    return min(1.0, max(by_steps, seconds / (60 * train.max_minutes)))


def checkpoint_is_due(step: int, minutes: float, section: CheckpointSection) -> bool:
    """After `step` steps, `minutes` after the last attempt to save: whichever interval has passed first."""
    return step % section.every_steps == 0 or minutes >= section.every_minutes
