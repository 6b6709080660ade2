"""How far a model is from labels that are probabilities: of the likeliest K tokens, each with its log-probability.

Forward KL at temperature 1, the loss of context distillation (Snell et al. 2022, 2209.15189, section 2). What the K do
not hold is one more outcome, "any other token", for teacher and student alike. Scaling the K up to 1 instead would ask
the student to be surer than its teacher (Anshumann et al. 2025, 2503.16870: the top K alone are a biased estimate that
over-estimates what it holds, and one token more for the rest mends most of it). With K = V there is no rest and this is
the full KL; with one token of probability 1 it is that token's negative log-likelihood.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The least that a student leaves to any other token: below it, 1 minus a sum of fp32 probabilities is rounding alone.
LEAST_REST = 2.0**-20


def divergence(logprobs_TK: Tensor, labels_TK: Tensor) -> Tensor:
    """KL(labels || model) in nats of each of T tokens, fp32, shape (T,).

    `logprobs_TK` are the model's, over the whole vocabulary, of the tokens that `labels_TK` gives log-probabilities;
    a place without a token is -inf there, and its column is not looked at.
    """
    there_TK = labels_TK.isfinite()
    p_TK = labels_TK.exp()  # 0 where nothing is
    known_TK = torch.where(there_TK, labels_TK, 0.0)
    logq_TK = torch.where(there_TK, logprobs_TK, 0.0)
    q_TK = torch.where(there_TK, logprobs_TK.exp(), 0.0)
    rest_T = (1 - p_TK.sum(-1)).clamp(min=0)
    others_T = torch.log1p(-q_TK.sum(-1).clamp(max=1 - LEAST_REST))
    return (p_TK * (known_TK - logq_TK)).sum(-1) + torch.xlogy(rest_T, rest_T) - rest_T * others_T
