"""Log-probabilities per token without the full logits ever existing.

Hidden states go through the head a chunk at a time, in the forward pass and again in the backward pass, so that at
most `chunk_tokens` x V logits live at once: 2,048 tokens of a 152k vocabulary would be 1.2 GB in fp32, a chunk of 128
is 78 MB. Only trained positions are asked for at all. What a model does after its head (Gemma 2's softcap, Granite's
scaling) is part of a chunk. Reducing the log-probabilities to a loss is another function: preference losses reduce
them in their own way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# fp32 logits of one chunk. Four copies of it live at the chunk's peak (logits in bf16 and fp32, log-softmax, its
# gradient); 64 MiB keeps them under a quarter GiB and a chunk's matmul large enough to fill a small GPU.
CHUNK_BYTES = 64 << 20

LogitsTransform = Callable[[Tensor], Tensor]


def chunk_tokens(vocabulary: int) -> int:
    """Tokens per chunk for a head of `vocabulary` rows: CHUNK_BYTES of fp32 logits, at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def logits_transform(config: Any) -> LogitsTransform | None:
    """What the model's own forward does to the head's output, read from its config.

    `final_logit_softcapping` (Gemma 2, Gemma 2 report section 2: cap * tanh(logits / cap)), `logits_scaling` (Granite:
    divides), `logit_scale` (Cohere: multiplies). A transform that is missing here is found by `training.selfcheck`.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    if cap:
        return partial(_softcap, cap=float(cap))
    if isinstance(divisor, (int, float)) and divisor != 1:
        return partial(torch.mul, other=1.0 / float(divisor))
    if isinstance(factor, (int, float)) and factor != 1:
        return partial(torch.mul, other=float(factor))
    return None


def _softcap(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def token_logprobs(
    hidden_TD: Tensor,
    targets_T: Tensor,
    head: nn.Module,
    transform: LogitsTransform | None,
    chunk: int,
) -> Tensor:
    """Log-probability of each target, fp32, shape (T,); differentiable with respect to hidden states and head."""
    pieces = []
    for start in range(0, hidden_TD.shape[0], chunk):
        hidden_CD, targets_C = hidden_TD[start : start + chunk], targets_T[start : start + chunk]
        run = partial(_chunk_logprobs, head=head, transform=transform)
        if torch.is_grad_enabled():
            # Nothing random happens in a head: no random state to keep for the recomputation.
            pieces.append(checkpoint(run, hidden_CD, targets_C, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(run(hidden_CD, targets_C))
    return torch.cat(pieces) if pieces else hidden_TD.new_zeros(0, dtype=torch.float32)


def _chunk_logprobs(hidden_CD: Tensor, targets_C: Tensor, head: nn.Module, transform: LogitsTransform | None) -> Tensor:
    logits_CV: Tensor = head(hidden_CD)
    if transform is not None:
        logits_CV = transform(logits_CV)
    logits_CV = logits_CV.float()
    chosen_C = logits_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1)
    return chosen_C - logits_CV.logsumexp(dim=-1)


def weighted_loss(logprobs_T: Tensor, weights_T: Tensor) -> Tensor:
    """Summed negative log-likelihood, a scalar in nats: divided by the whole step's weights, never by a batch's own.

    A mean of micro-batch means gives tokens of short batches more weight (157 % relative gradient error on one uneven
    toy batch); the sum over the step does not.
    """
    return -(logprobs_T * weights_T).sum()
