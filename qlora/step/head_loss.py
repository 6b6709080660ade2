"""Head and loss in one pass: the gradient is there when the loss is, so that a chunk's logits are made once.

Where each token's weight in the loss is known beforehand, so is the gradient of its logits: (softmax - one-hot) times
that weight. Of a chunk, logits = h W', over them goes their gradient, and the hidden states' is that times W: two
products in place of three (`loss.token_logprobs` makes logits again in the backward pass), one copy of the logits in
place of four, and no graph. Where weights follow from the log-probabilities (`objectives.py`), these are made first, by
a pass that keeps no logits: three products again, and the memory of one copy. Soft labels, and heads that are
trained or are more than a product, keep that function. The weights are those of the step, divided by its sum: gradients
are rounded once, and nothing is multiplied behind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from qlora.batch import Batch
from qlora.device import is_card
from qlora.step import loss
from qlora.step.group_relative import GroupObjective
from qlora.step.kernels import operators, trial
from qlora.step.loss import TILE_ROWS, LogitsTransform, Objective, SupervisedObjective, softcap
from qlora.step.objectives import PreferenceObjective

# Logits of one chunk in bf16: with 512 tokens and more the head's weight, read twice, takes a GPU less time than the
# products (128,256 x 4,096: 1.05 GB, 2.1 ms of an RTX 4090's 1 TB/s, beside 3.3 ms of its 165 TFLOP/s); from 1,024 on
# nothing is gained. 128 MiB are half of what the four copies of `loss.CHUNK_BYTES` take.
CHUNK_BYTES, MOST_TOKENS = 128 << 20, 1024


def chunk_tokens(vocabulary: int) -> int:
    """Tokens a chunk: whole tiles of a GPU's products, as many as CHUNK_BYTES hold."""
    tokens = CHUNK_BYTES // (2 * vocabulary) // TILE_ROWS * TILE_ROWS
    return min(MOST_TOKENS, max(TILE_ROWS, tokens))


def chunk_of_run(vocabulary: int, device: torch.device) -> int:
    """Tokens a chunk in a new run on `device`; 0 where loss and gradient come apart: on a GPU without the kernel."""
    if device.type == "cpu" and not is_card(device):
        return loss.chunk_tokens(vocabulary)  # whose logits are fp32 there while they are a product
    return chunk_tokens(vocabulary) if trial.work(device) else 0


class Head(NamedTuple):
    """A head that is one product, with what a model does to its logits: times `factor`, then capped (0: not)."""

    weight: Tensor
    bias: Tensor | None
    factor: float
    cap: float


def head_of(head: nn.Module, transform: LogitsTransform | None) -> Head | None:
    """What `head` is made of; None where it is trained, watched, or another thing than a product."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    if head._forward_hooks or head._forward_pre_hooks or any(one.requires_grad for one in head.parameters()):
        return None
    scaling = scaling_of(transform)
    return None if scaling is None else Head(head.weight, head.bias, *scaling)  # type: ignore[arg-type]


def scaling_of(transform: LogitsTransform | None) -> tuple[float, float] | None:
    if transform is None:
        return 1.0, 0.0
    function, named = (transform.func, transform.keywords) if isinstance(transform, partial) else (None, {})
    if function is softcap:
        return named["factor"], named["cap"]
    return (named["other"], 0.0) if function is torch.mul else None


Weigh = Callable[[Tensor], tuple[Tensor, Tensor]]  # of log-probabilities: what each weighs, and the summed loss


def weights_of(objective: Objective, batch: Batch) -> Tensor | Weigh | None:
    """The weight of each trained token's negative log-probability in the sum, or what makes them of log-probabilities;
    None where they are more than weights."""
    if isinstance(objective, PreferenceObjective | GroupObjective):
        return partial(_weighed, objective=objective, batch=batch)
    if not isinstance(objective, SupervisedObjective) or batch.label_ids_TK is not None:
        return None
    return batch.loss_weights_BS.flatten().index_select(0, batch.trained_T)


def _weighed(logprobs_T: Tensor, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """The weight of each token's negative log-probability in the gradient of the summed loss, and that loss."""
    logprobs_T = logprobs_T.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective.loss(logprobs_T, batch)
    (gradient_T,) = torch.autograd.grad(loss, logprobs_T)
    return -gradient_T, loss.detach()


def share_and_loss(
    hidden_TD: Tensor, targets_T: Tensor, weights_T: Tensor | Weigh, step_weight: float, head: Head, chunk: int
) -> tuple[Tensor, Tensor]:
    """The summed loss over `step_weight`, to go back through, and the summed loss, to report.

    Of weights that follow from log-probabilities, the first is no loss: its gradient is.
    """
    if not isinstance(weights_T, Tensor):
        weights_T, summed = weights_T(_logprobs(hidden_TD.detach(), targets_T, head, chunk))
        return _OnePass.apply(hidden_TD, targets_T, weights_T, step_weight, head, chunk)[0], summed  # type: ignore[no-untyped-call]
    return _OnePass.apply(hidden_TD, targets_T, weights_T, step_weight, head, chunk)  # type: ignore[no-any-return, no-untyped-call]


def _logprobs(hidden_TD: Tensor, targets_T: Tensor, head: Head, chunk: int) -> Tensor:
    """Log-probabilities of the targets, as the pass with the gradient will have them."""
    nothing_T, logprobs = torch.zeros_like(targets_T, dtype=torch.float32), []
    for start in range(0, len(hidden_TD), chunk):
        part = slice(start, start + chunk)
        logits_CV = linear(hidden_TD[part].to(head.weight.dtype), head.weight, head.bias)
        scaling = (head.factor, head.cap)
        logprobs.append(operators.cross_entropy_(logits_CV, targets_T[part], nothing_T[part], *scaling))
        del logits_CV
    return torch.cat(logprobs) if logprobs else nothing_T


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, targets_T: Tensor, weights_T: Tensor, step_weight: float, head: Head, chunk: int
    ) -> tuple[Tensor, Tensor]:
        kind = head.weight.dtype  # Mamba's layers hand on fp32
        grad_TD = torch.empty(hidden_TD.shape, dtype=kind, device=hidden_TD.device)
        shares_T, logprobs = weights_T / step_weight, []
        for start in range(0, len(hidden_TD), chunk):
            part = slice(start, start + chunk)
            logits_CV = linear(hidden_TD[part].to(kind), head.weight, head.bias)
            scaling = (head.factor, head.cap)
            logprobs.append(operators.cross_entropy_(logits_CV, targets_T[part], shares_T[part], *scaling))
            grad_TD[part] = logits_CV @ head.weight
            del logits_CV
        ctx.save_for_backward(grad_TD)
        ctx.kind = hidden_TD.dtype
        summed = -(torch.cat(logprobs) * weights_T).sum() if logprobs else weights_T.new_zeros(())  # no trained token
        ctx.mark_non_differentiable(summed)
        return summed / step_weight, summed

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        (grad_TD,) = ctx.saved_tensors
        return (grad_TD.mul_(gradient).to(ctx.kind), None, None, None, None, None)
