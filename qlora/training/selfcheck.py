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
from qlora.errors import DoesNotFit, ModelError
from qlora.model import attention_choice, full_logits, precision
from qlora.step.forward import CausalParts, batch_logprobs, evaluating
from qlora.step.optimizer import AdapterOptimizer
from qlora.training.recovery import attempt

# Mean absolute difference of log-probabilities, nats. 4-bit weights and bf16 kernels of other shapes differ by 0.003 to
# 0.04; on rows that a base finds unlikely by more: one of 135M by 0.074, and by 0.092 between its own eager and sdpa.
# What is over the first is compared with that: up to NOISE times it is rounding. Recurrent layers leak up to 0.046, a
# cap may change 0.011: none of that is found here, which is why it is known before.
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
    own = partial(_own_logprobs, causal_lm, rows, device)
    with evaluating(causal_lm):
        reference = own()
        alone = torch.cat([_ours(parts, rows, (row,), device) for row in (0, 1)])
        packed = _ours(parts, rows, (0, 1), device)
        head, leak = (float((one - reference).abs().mean()) for one in (alone, packed))
        again = None if head <= TOLERANCE else attention_choice.in_another(causal_lm, own)
    if precision.of_run() == torch.float16:
        precision.refuse_overflow(causal_lm.name_or_path, torch.cat((reference, alone, packed)))
    return SelfCheck(head, leak, noise=0.0 if again is None else float((again - reference).abs().mean()))


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


def _own_logprobs(causal_lm: Any, split: PreparedSplit, device: torch.device) -> Tensor:
    """The model's full forward on each row by itself: log-probabilities of the trained tokens."""
    found = []
    for tokens in (split.rows[0], split.rows[1]):
        logprobs_S = full_logits.logprobs(causal_lm, torch.tensor(tokens.input_ids, device=device))
        trained = [i for i, weight in enumerate(tokens.loss_weights[1:]) if weight]
        found.append(logprobs_S[torch.tensor(trained, device=device)].double())
    return torch.cat(found)
