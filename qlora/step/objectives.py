"""Losses of preference: from the log-probabilities of whole answers, which the step has token by token.

An answer's log-probability is the sum over its trained tokens. `pi` is the model's, `ref` that of the model as it was
before (adapters off, or the adapter that the run began with), n the answer's tokens, w and l the better and the worse
answer of a pair, s the logistic function:

    dpo    -log s(h) (1 - e) - log s(-h) e,  h = beta ((pi_w - ref_w) - (pi_l - ref_l))
           Rafailov et al. 2023, 2305.18290, equation 7; e is the share of swapped labels of cDPO (Mitchell 2023)
    ipo    (h - 1 / (2 beta))^2,  h = (pi_w - ref_w) / n_w - (pi_l - ref_l) / n_l
           Azar et al. 2023, 2310.12036, equation 17, whose sums are means over tokens here, as its authors told TRL
    orpo   beta (-log s(log odds_w - log odds_l)) - pi_w / n_w,  odds = p / (1 - p), log p = pi / n
           Hong et al. 2024, 2403.07691, equations 6 and 7
    simpo  -log s(beta pi_w / n_w - beta pi_l / n_l - gamma)
           Meng et al. 2024, 2405.14734, equation 6
    kto    a (1 - s(beta (pi - ref - z))) of a good answer, b (1 - s(beta (z - pi + ref))) of a bad one
           Ethayarajh et al. 2024, 2402.01306, equation 8; a and b are its lambdas, z is the KL of the step (`begin`)

`sft_weight` adds the mean negative log-likelihood of the better answer's tokens (Pang et al. 2024, 2404.19733, equation
1). A step's loss is the mean over all of its pairs (of kto: over its answers), whatever micro-batches they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qlora.batch import Batch
from qlora.objective_keys import ObjectiveKeys
from qlora.step.group_relative import GroupObjective
from qlora.step.loss import Objective, SupervisedObjective

Share = Callable[[Sequence[Batch], Callable[[Batch], Tensor]], Sequence[Tensor]]  # what is asked of each, in order

# The surest that a mean log-probability is taken to be: at 0 the odds of ORPO are infinite, and so is their gradient.
SUREST = -(2.0**-20)


class Answers(NamedTuple):
    """Of the R answers of a micro-batch: sums of log-probabilities, tokens, and sums of the reference. All fp32."""

    logprobs_R: Tensor
    tokens_R: Tensor
    reference_R: Tensor
    signs_R: Tensor  # 1 is the better answer or a good one, -1 the worse or a bad one

    @property
    def means_R(self) -> Tensor:
        return self.logprobs_R / self.tokens_R

    @property
    def gains_R(self) -> Tensor:
        return self.logprobs_R - self.reference_R


class Figures(NamedTuple):
    """Sums over answers, or pairs of them, in one fp64 tensor each; `of` adds those of several micro-batches.

    `rewards` are beta times what each objective compares: log-ratios to the reference (dpo, kto; ipo a token), or mean
    log-probabilities (orpo, simpo).
    """

    compared: float  # pairs; of marked answers, these
    right: float  # of these, whose better answer has the higher reward, ties half (marked: a good one over z)
    better: float  # answers
    worse: float
    better_reward: float  # sums
    worse_reward: float
    loss: float  # of all tokens of all answers, in nats
    tokens: float
    likelier: float  # pairs whose better answer is the likelier one, a token; 0 of marked answers

    @classmethod
    def of(cls, values: Iterable[Tensor]) -> Figures:
        return cls(*torch.stack(list(values)).sum(0).tolist())


def objective_of(keys: ObjectiveKeys) -> Objective:
    """What a run with these keys minimizes."""
    if keys.objective == "grpo":
        return GroupObjective(keys)
    return SupervisedObjective() if keys.objective == "sft" else PreferenceObjective(keys)


def answers_of(logprobs_T: Tensor, batch: Batch) -> Answers:
    """Of the log-probabilities of `batch.trained_T`, the sums of each answer."""
    assert batch.answer_T is not None and batch.signs_R is not None and batch.reference_R is not None
    zeros_R = torch.zeros_like(batch.signs_R)
    logprobs_R = zeros_R.index_add(0, batch.answer_T, logprobs_T)
    tokens_R = zeros_R.index_add(0, batch.answer_T, torch.ones_like(logprobs_T.detach()))
    return Answers(logprobs_R, tokens_R, batch.reference_R, batch.signs_R)


def alone(batches: Sequence[Batch], ask: Callable[[Batch], Tensor]) -> list[Tensor]:
    """A `Share` of one process."""
    return [ask(batch) for batch in batches]


class PreferenceObjective:
    """An `Objective` (see `loss.py`) over answers, with the figures of what it was asked about since `begin`."""

    def __init__(self, keys: ObjectiveKeys) -> None:
        self.keys = keys
        self.seen: list[Tensor] = []  # of each micro-batch, on its device: the values of `Figures`
        self.divergence: Tensor | float = 0.0  # z of kto

    def begin(self, batches: Sequence[Batch], ask: Callable[[Batch], Tensor], share: Share = alone) -> None:
        """Begin with the micro-batches of a step, or of an evaluation; `ask` gives a batch's log-probabilities, `share`
        has them all asked, by whichever process.

        KTO's z is the mean of pi - ref over answers that belong to other questions, 0 at least, without a gradient
        (equation 8, and its estimate from a micro-batch below it; TRL takes the next answer of a micro-batch as well).
        It is one number of the whole step here, so that it does not depend on how many micro-batches that has.
        """
        self.seen.clear()
        self.divergence = 0.0
        if self.keys.objective != "kto":
            return

        def of_others(batch: Batch) -> Tensor:
            gains = [answers_of(ask(other), other).gains_R for other in batch.others]
            return torch.cat(gains) if gains else torch.zeros(0)

        if gains := [one.float() for one in share(batches, of_others) if one.numel()]:
            self.divergence = torch.cat(gains).mean().clamp(min=0.0)

    def weight(self, batch: Batch) -> float:
        assert batch.signs_R is not None
        return batch.signs_R.numel() / (1 if self.keys.objective == "kto" else 2)

    def loss(self, logprobs_T: Tensor, batch: Batch) -> Tensor:
        answers = answers_of(logprobs_T, batch)
        losses, rewards_R = self._of_marks(answers) if self.keys.objective == "kto" else self._of_pairs(answers)
        with torch.no_grad():
            self.seen.append(self._figures(answers, rewards_R, batch.paired))
        return losses.sum()

    def _of_pairs(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Losses of the pairs, and the reward of each answer."""
        keys, beta = self.keys, self.keys.strength
        if keys.objective == "dpo":
            rewards_R = beta * answers.gains_R
            margins = rewards_R[0::2] - rewards_R[1::2]
            swapped = keys.label_smoothing
            losses = -logsigmoid(margins) * (1 - swapped) - logsigmoid(-margins) * swapped
        elif keys.objective == "ipo":
            gains_R = answers.gains_R / answers.tokens_R
            rewards_R = beta * gains_R
            losses = (gains_R[0::2] - gains_R[1::2] - 1 / (2 * beta)).square()
        elif keys.objective == "orpo":
            means_R = answers.means_R.clamp(max=SUREST)
            odds_R = means_R - torch.log(-torch.expm1(means_R))
            rewards_R = beta * answers.means_R
            losses = -beta * logsigmoid(odds_R[0::2] - odds_R[1::2])
        else:
            rewards_R = beta * answers.means_R
            losses = -logsigmoid(rewards_R[0::2] - rewards_R[1::2] - keys.margin)
        if keys.of_answers:
            losses = losses - keys.of_answers * answers.means_R[0::2]
        return losses, rewards_R

    def _of_marks(self, answers: Answers) -> tuple[Tensor, Tensor]:
        beta = self.keys.strength
        above_R = beta * (answers.gains_R - self.divergence)
        weights_R = torch.where(answers.signs_R > 0, self.keys.of_good, self.keys.of_bad)
        return weights_R * (1 - torch.sigmoid(answers.signs_R * above_R)), beta * answers.gains_R

    def _figures(self, answers: Answers, rewards_R: Tensor, paired: bool) -> Tensor:
        good_R, means_R = answers.signs_R > 0, answers.means_R
        if paired:
            right = 0.5 + 0.5 * torch.sign(rewards_R[0::2] - rewards_R[1::2])  # the same model says: half
            likelier = means_R[0::2] > means_R[1::2]
        else:
            right = answers.signs_R * (rewards_R - self.keys.strength * self.divergence) > 0
            likelier = torch.zeros_like(right)
        ones = torch.ones_like(right)
        values = (
            *(ones, right, good_R, ~good_R),
            *(torch.where(good_R, rewards_R, 0.0), torch.where(good_R, 0.0, rewards_R)),
            *(-answers.logprobs_R, answers.tokens_R, likelier),
        )
        return torch.stack([value.double().sum() for value in values])
