"""What a run of GRPO reports beside its steps: what answers were worth, and how far the model has moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qlora.events import Event


@dataclass(frozen=True)
class Rewarded(Event):
    """What answers were worth: those that a step learned from, or greedy ones to questions of `evaluated` rows.

    `reward` is the mean over `answers` of the weighted sum, `rewards` that of each function by its name. Shares of 0 to
    1: `without_signal` of groups whose answers are all worth the same, `cut` of answers that max_completion_length has
    cut, `clipped` of tokens whose ratio was. `tokens` is the mean length of an answer with its end token. In nats a
    token: `kl` from the model as it was (k3), `mismatch` between the log-probabilities of the step and of the drawing.
    None: not measured.
    """

    kind: ClassVar[str] = "rewards"
    step: int
    evaluated: bool
    answers: int
    reward: float
    rewards: Mapping[str, float]
    tokens: float
    cut: float
    without_signal: float | None = None
    kl: float | None = None
    clipped: float | None = None
    mismatch: float | None = None
