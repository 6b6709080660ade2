"""Before step 1: is our loss the model's own loss, packed and alone? And what would fail late is tried at once.

Two things can differ without a sound: our chunked head, and what documents of one pack see of each other. Both are
known of the architecture before a weight is read (`model.family_facts`). This is the last net, under the model as it
was loaded, whose own noise allows no finer mesh: what is wrong with a kernel or with the weights is found by asking the
model itself about two short rows.
The loop's dry run of the longest rows leaves no trace: `restoring_state` puts everything back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora.data.loader import collate
from qlora.data.prepare import PreparedSplit
from qlora.data.short_rows import two_short_rows
from qlora.device import random_state_kept, release_memory
from qlora.errors import DoesNotFit, ModelError, foreign_failures
from qlora.model import attention_choice, full_logits, precision
from qlora.step.forward import CausalParts, batch_logprobs, evaluating
from qlora.step.optimizer import AdapterOptimizer
from qlora.training.recovery import attempt

# Mean absolute difference of log-probabilities, nats. Up to it nothing more is asked: 4-bit weights and bf16 kernels of
# different shapes differ by 0.003 to 0.04 on tiny and real models. On rows that a model finds unlikely it is more: a
# right kernel of a base of 135M is 0.074 off on words in any order, and the model's own two attentions 0.092. So what
# is over it is compared with those two: up to NOISE times their difference is rounding. Recurrent layers leak 0.004 to
# 0.046, a cap may change 0.011: none of that is found here, which is why it is known before.
TOLERANCE, NOISE = 0.05, 2.0
# Of a row: the beginning of a row is a row. Where even its logits have no room, fewer are asked about.
TOKENS_PER_ROW = (full_logits.TOKENS, full_logits.TOKENS // 4, full_logits.TOKENS // 16)


@dataclass(frozen=True)
class SelfCheck:
    """Differences in nats: `head` of our loss on single rows, `leak` of packed rows, against the model's own; `noise`
    of its own in another attention, where that was asked."""

    head: float
    leak: float
    noise: float = 0.0

    @property
    def leak_message(self) -> str:
        """Why rows must not share a pack; "" where they may."""
        if self.leak <= max(TOLERANCE, 3 * self.head):
            return ""
        return (
            f"documents of one pack see each other in this architecture "
            f"({self.leak:.2f} nats a token; {self.head:.3f} alone)"
        )


def run(causal_lm: Any, parts: CausalParts, split: PreparedSplit, device: torch.device) -> SelfCheck | None:
    """Compare on two short rows; None where there are not two with trained tokens. Raises ModelError, DoesNotFit."""
    reason = ""
    for tokens in TOKENS_PER_ROW:
        if (rows := two_short_rows(split, tokens)) is None:
            return None
        compared, reason = attempt(partial(_compare, causal_lm, parts, rows, device))
        if compared is not None:
            return _checked(compared[0])
        release_memory(device)
    raise DoesNotFit(f"{reason}, in the forward pass of a row of {tokens} tokens", "use a smaller base")


def _compare(causal_lm: Any, parts: CausalParts, rows: PreparedSplit, device: torch.device) -> SelfCheck:
    with evaluating(causal_lm):
        reference = torch.cat([_own_logprobs(causal_lm, rows, row, device) for row in (0, 1)])
        alone = torch.cat([_ours(parts, rows, (row,), device) for row in (0, 1)])
        packed = _ours(parts, rows, (0, 1), device)
    if precision.of_run() == torch.float16:
        precision.refuse_overflow(causal_lm.name_or_path, torch.cat((reference, alone, packed)))
    head, leak = (float((one - reference).abs().mean()) for one in (alone, packed))
    noise = 0.0 if head <= TOLERANCE else _noise(causal_lm, rows, reference, device)
    return SelfCheck(head, leak, noise)


def _noise(causal_lm: Any, rows: PreparedSplit, reference: Tensor, device: torch.device) -> float:
    """How far the model's own forward is from `reference`, which is its own too, with another of its attentions; 0
    where it has no other."""
    other = "eager" if attention_choice.today(causal_lm) != "eager" else "sdpa"
    with foreign_failures(trial=True) as failure, evaluating(causal_lm), attention_choice.attending(causal_lm, other):
        again = torch.cat([_own_logprobs(causal_lm, rows, row, device) for row in (0, 1)])
    return 0.0 if failure.error else float((again - reference).abs().mean())


def _checked(check: SelfCheck) -> SelfCheck:
    if not check.head <= max(TOLERANCE, NOISE * check.noise):
        raise ModelError(
            f"this architecture's loss cannot be computed in chunks: it differs from the model's own by "
            f"{check.head:.3f} nats a token (its forward does something after the head that is not known here)",
            "use a base of another architecture, and report this one",
        )
    return check


def restoring_state(optimizer: AdapterOptimizer, device: torch.device, work: Callable[[], None]) -> None:
    """Runs `work`, which may update the weights, and puts weights, moments, gradients and random state back."""
    tensors, counters = optimizer.state()
    rounded = {key: parameter.detach().to("cpu", copy=True) for key, parameter in optimizer.parameters.items()}
    try:
        with random_state_kept(device):
            work()
    finally:
        optimizer.zero_gradients()
        optimizer.load_state(tensors, counters)
        with torch.no_grad():
            for key, parameter in optimizer.parameters.items():
                parameter.copy_(rounded[key])


def _ours(parts: CausalParts, split: PreparedSplit, pack: tuple[int, ...], device: torch.device) -> Tensor:
    # Padding is part of the question: it must not reach the rows either.
    length = sum(split.lengths[row] for row in pack) + 8
    batch = collate(split, [pack], 0, length)
    return batch_logprobs(parts, batch.to(device)).double()


def _own_logprobs(causal_lm: Any, split: PreparedSplit, row: int, device: torch.device) -> Tensor:
    """The model's full forward on one row: log-probabilities of its trained tokens."""
    tokens = split.rows[row]
    logprobs_S = full_logits.logprobs(causal_lm, torch.tensor(tokens.input_ids, device=device))
    trained = [i for i, weight in enumerate(tokens.loss_weights[1:]) if weight]
    return logprobs_S[torch.tensor(trained, device=device)].double()
