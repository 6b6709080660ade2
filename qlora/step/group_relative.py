"""GRPO: each answer is compared with the other answers of its group, which the model drew to the same question.

Shao et al. 2024, 2402.03300 (DeepSeekMath), equation 3 with the outcome's advantage of section 4.1.2, a token:

    -min(r A, clip(r, 1 - e, 1 + e') A) + beta (exp(q) - q - 1)
    r = exp(pi - old), q = ref - pi,  A = (R - mean of the group) / (deviation of the group + 1e-4)

`pi`, `old` and `ref` are log-probabilities of the token by the model, by the model that drew it, and by what the run
began with, all of logits over the temperature that it was drawn at (so TRL's GRPOTrainer). e' is e, or more (DAPO's
clip-higher: Yu et al. 2025, 2503.14476, section 3.1); the second term is the k3 estimate of the KL (equation 4). While
one step is taken on each answer, old is pi itself, without its gradient. What a token counts in the step's loss, by
TRL's names:

    grpo      a mean over answers of means over their tokens (DeepSeekMath, equation 3)
    dapo      a mean over all tokens of the step (DAPO, section 3.3)
    dr_grpo   a sum over tokens over answers times the most tokens that one may have (Liu et al. 2025, 2503.20783)

A deviation is of the group, with n - 1 below (torch.std, as TRL), of all rewards of the step (`batch`), or none
(`none`; Liu et al., section 3.2). Masked answers, that did not end by themselves, weigh nothing; in the means over
answers they are counted (TRL, mask_truncated_completions).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.objective_keys import ObjectiveKeys
from qlora.step.loss import LogitsTransform, SupervisedObjective

BESIDE_DEVIATION = 1e-4  # TRL's; what keeps equal rewards from being divided by nothing


class Known(NamedTuple):
    """Rows of `Batch.drawn_KT`: of each trained token, what is known before the step."""

    advantages_T: Tensor
    drawn_T: Tensor  # its log-probability when it was drawn, by the way that draws
    reference_T: Tensor  # 0 where there is no reference
    old_T: Tensor  # 0 where one step is taken on each answer


class Seen(NamedTuple):
    """Sums over trained tokens; `of` adds those of several micro-batches."""

    tokens: float
    kl: float  # k3, in nats
    clipped: float  # tokens whose ratio was cut, so that they have no gradient of the first term
    mismatch: float  # |pi - its log-probability when it was drawn|, in nats

    @classmethod
    def of(cls, values: Iterable[Tensor]) -> Seen:
        return cls(*torch.stack(list(values)).sum(0).tolist())


class GroupObjective:
    """An `Objective` (see `loss.py`) over answers that the model drew; of rows that show one, that answer's loss."""

    def __init__(self, keys: ObjectiveKeys) -> None:
        self.keys = keys
        self.seen: list[Tensor] = []  # of each micro-batch since `begin`, on its device: the values of `Seen`
        self._supervised = SupervisedObjective()

    def begin(self) -> None:
        self.seen.clear()

    def weight(self, batch: Batch) -> float:
        if batch.drawn_KT is None or self.keys.loss_type == "dapo":
            return self._supervised.weight(batch)
        assert batch.signs_R is not None
        return float(batch.signs_R.numel())

    def loss(self, logprobs_T: Tensor, batch: Batch) -> Tensor:
        if batch.drawn_KT is None:
            return self._supervised.loss(logprobs_T, batch)
        known, keys = Known(*batch.drawn_KT), self.keys
        old_T = known.old_T if keys.num_iterations > 1 else logprobs_T.detach()
        ratios_T = torch.exp(logprobs_T - old_T)
        gains_T = ratios_T * known.advantages_T
        below, above = keys.clip
        cut_T = ratios_T.clamp(1 - below, 1 + above) * known.advantages_T
        losses_T = -torch.minimum(gains_T, cut_T)
        further_T = known.reference_T - logprobs_T
        divergences_T = torch.exp(further_T) - further_T - 1
        if keys.needs_reference:
            losses_T = losses_T + keys.strength * divergences_T
        with torch.no_grad():
            self.seen.append(self._seen(logprobs_T, known, cut_T < gains_T, divergences_T))
        return (losses_T * batch.loss_weights_BS.flatten().index_select(0, batch.trained_T)).sum()

    def _seen(self, logprobs_T: Tensor, known: Known, clipped_T: Tensor, divergences_T: Tensor) -> Tensor:
        divergences_T = divergences_T if self.keys.needs_reference else torch.zeros_like(divergences_T)
        mismatch_T = (logprobs_T - known.drawn_T).abs()
        values = (torch.ones_like(logprobs_T), divergences_T, clipped_T, mismatch_T)
        return torch.stack([value.double().sum() for value in values])


def advantages_of(rewards: Sequence[float], keys: ObjectiveKeys) -> list[float]:
    """Of the rewards of a step's answers, those of a group one behind the other."""
    rewards_QG = torch.tensor(rewards, dtype=torch.float64).view(-1, keys.num_generations)
    beside_QG = rewards_QG - rewards_QG.mean(dim=1, keepdim=True)
    if keys.scale_rewards == "group":
        beside_QG = beside_QG / (rewards_QG.std(dim=1, keepdim=True) + BESIDE_DEVIATION)
    elif keys.scale_rewards == "batch":
        beside_QG = beside_QG / (rewards_QG.std() + BESIDE_DEVIATION)
    return beside_QG.flatten().tolist()


def without_signal(rewards: Sequence[float], group: int) -> int:
    """Groups whose answers all have the same reward: nothing is learned of them."""
    return sum(len(set(rewards[start : start + group])) == 1 for start in range(0, len(rewards), group))


def token_weight(tokens: int, keys: ObjectiveKeys) -> float:
    """What each token of an answer of so many weighs in the summed loss."""
    ways = {"grpo": 1 / max(tokens, 1), "dapo": 1.0, "dr_grpo": 1 / keys.max_completion_length}
    return ways[keys.loss_type]


def at_temperature(transform: LogitsTransform | None, temperature: float) -> LogitsTransform | None:
    """What is done to the logits, and then they are divided by `temperature`; one factor where it can be one."""
    if temperature == 1:
        return transform
    if transform is None:
        return partial(torch.mul, other=1 / temperature)
    if isinstance(transform, partial) and transform.func is torch.mul:
        return partial(torch.mul, other=transform.keywords["other"] / temperature)
    return partial(_then_divided, transform=transform, by=temperature)


def _then_divided(logits: Tensor, transform: LogitsTransform, by: float) -> Tensor:
    return transform(logits) / by
