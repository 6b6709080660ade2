"""Log-probabilities per token without the full logits ever existing.

Hidden states go through the head a chunk at a time, in the forward pass and again in the backward pass, so that at
most `chunk_tokens` x V logits live at once: 2,048 tokens of a 152k vocabulary would be 1.2 GB in fp32, a chunk of 128
is 78 MB. Only trained positions are asked for at all. What a model does after its head (Gemma 2's softcap, Granite's
scaling) is part of a chunk. How log-probabilities become a loss is a value, the `Objective`: preference losses
reduce them in their own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora.batch import Batch
from qlora.step.soft_labels import divergence

# fp32 logits of one chunk. Four copies of it live at the chunk's peak (logits in bf16 and fp32, log-softmax, its
# gradient); 64 MiB keeps them under a quarter GiB and a chunk's matmul large enough to fill a small GPU.
CHUNK_BYTES = 64 << 20

LogitsTransform = Callable[[Tensor], Tensor]


# A GPU multiplies in tiles of 128 rows (cuBLAS; 64 are a tile too): 130 tokens cost what 256 do.
TILE_ROWS, SMALLEST_TILE_ROWS = 128, 64


def chunk_tokens(vocabulary: int, on_card: bool = False) -> int:
    """Tokens a chunk for a head of `vocabulary` rows: CHUNK_BYTES of fp32 logits, 16 at least; whole tiles on a GPU."""
    tokens = max(16, CHUNK_BYTES // (4 * vocabulary))
    return max(SMALLEST_TILE_ROWS, tokens // TILE_ROWS * TILE_ROWS) if on_card else tokens


# Keys that scale or cap the head's output, as transformers calls them: Gemma 2 (cap * tanh(logits / cap), report
# section 2), RecurrentGemma and xLSTM; Cohere and Falcon-H1 multiply, Granite and MiniCPM 3 divide.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISOR = "logits_scaling"
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # HyperCLOVAXForCausalLM.forward, for the key by which Granite divides


def logits_transform(config: Any) -> LogitsTransform | None:
    """What the model's own forward does to the head's output, by its config; `model.family_facts` compares the two."""
    factor = math.prod(_number(config, key) or 1.0 for key in FACTORS)
    if divisor := _number(config, DIVISOR):
        factor *= divisor if getattr(config, "model_type", "") in MULTIPLIES_BY_DIVISOR else 1.0 / divisor
    if cap := next(filter(None, (_number(config, key) for key in CAPS)), None):
        return partial(softcap, cap=cap, factor=factor)
    return partial(torch.mul, other=factor) if factor != 1 else None


def _number(config: Any, key: str) -> float | None:
    value = getattr(config, key, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value else None


def softcap(logits: Tensor, cap: float, factor: float) -> Tensor:
    return torch.tanh(logits * factor / cap if factor != 1 else logits / cap) * cap


def token_logprobs(
    hidden_TD: Tensor, targets_T: Tensor, head: nn.Module, transform: LogitsTransform | None, chunk: int
) -> Tensor:
    """Log-probability of each target, fp32, of their shape; differentiable with respect to hidden states and head.

    `targets_T` are one token a position, or (T, K) of them: K columns of a chunk's logits are gathered as one is.
    """
    pieces = []
    for start in range(0, hidden_TD.shape[0], chunk):
        hidden_CD, targets_C = hidden_TD[start : start + chunk], targets_T[start : start + chunk]
        run = partial(_chunk_logprobs, head=head, transform=transform)
        if torch.is_grad_enabled():
            # Nothing random happens in a head: no random state to keep for the recomputation.
            pieces.append(checkpoint(run, hidden_CD, targets_C, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(run(hidden_CD, targets_C))
    return torch.cat(pieces) if pieces else hidden_TD.new_zeros(targets_T.shape, dtype=torch.float32)


def _chunk_logprobs(hidden_CD: Tensor, targets_C: Tensor, head: nn.Module, transform: LogitsTransform | None) -> Tensor:
    logits_CV: Tensor = head(hidden_CD.to(next(head.parameters()).dtype))  # Mamba's layers hand on fp32
    if transform is not None:
        logits_CV = transform(logits_CV)
    logits_CV = logits_CV.float()
    chosen = logits_CV.gather(-1, targets_C.view(len(targets_C), -1)).view(targets_C.shape)
    return chosen - logits_CV.logsumexp(dim=-1, keepdim=targets_C.dim() > 1)


class Objective(Protocol):
    """What a step minimizes, and evaluation measures: the sum of `loss` over all micro-batches, over that of `weight`.

    Never a micro-batch's own mean: a mean of means gives the tokens of short micro-batches more weight (157 % relative
    gradient error on one uneven toy batch). See qlora/README.md, token-weighted accumulation.
    """

    def weight(self, batch: Batch) -> float:
        """What the micro-batch counts in the whole. Called while the batch is on the host."""
        ...

    def loss(self, logprobs_T: Tensor, batch: Batch) -> Tensor:
        """The micro-batch's summed loss, a scalar, from the log-probabilities of `batch.trained_T` (see `forward`)."""
        ...


@dataclass(frozen=True)
class SupervisedObjective:
    """Negative log-likelihood of the trained tokens, or KL from their labels, in nats, each times its loss weight."""

    def weight(self, batch: Batch) -> float:
        return float(batch.loss_weights_BS.sum())

    def loss(self, logprobs_T: Tensor, batch: Batch) -> Tensor:
        if batch.label_logprobs_TK is not None:
            logprobs_T = -divergence(logprobs_T, batch.label_logprobs_TK)
        weights_T = batch.loss_weights_BS.flatten().index_select(0, batch.trained_T)
        return -(logprobs_T * weights_T).sum()
