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
from typing import Any

import torch
from torch import Tensor

from qlora.data.loader import collate
from qlora.data.prepare import PreparedSplit
from qlora.device import random_state_kept
from qlora.errors import ModelError
from qlora.step.forward import CausalParts, batch_logprobs, evaluating
from qlora.step.optimizer import AdapterOptimizer

# Mean absolute difference of log-probabilities, nats. 4-bit weights and bf16 kernels of different shapes differ by
# 0.003 to 0.02 on tiny and real models; two and a half times that is no noise. Recurrent layers leak 0.004 to 0.046, a
# cap may change 0.011: none of that is found here, which is why it is known before.
TOLERANCE = 0.05
TOKENS_PER_ROW = 256


@dataclass(frozen=True)
class SelfCheck:
    """Differences in nats: `head` of our loss on single rows, `leak` of packed rows, against the model's own."""

    head: float
    leak: float

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
    """Compare on two short rows; None when there are not two rows with trained tokens. Raises ModelError."""
    rows = [i for i in sorted(range(len(split.lengths)), key=lambda i: split.lengths[i]) if split.trained[i]]
    rows = [i for i in rows if split.lengths[i] <= TOKENS_PER_ROW][-2:] or rows[:2]
    if len(rows) < 2:
        return None
    with evaluating(causal_lm):
        reference = torch.cat([_own_logprobs(causal_lm, split, row, device) for row in rows])
        alone = torch.cat([_ours(parts, split, (row,), device) for row in rows])
        packed = _ours(parts, split, tuple(rows), device)
    check = SelfCheck(head=float((alone - reference).abs().mean()), leak=float((packed - reference).abs().mean()))
    if not check.head <= TOLERANCE:
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
        optimizer.inner.state.clear()
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
    ids_S = torch.tensor(tokens.input_ids, device=device)
    logits_SV = causal_lm(input_ids=ids_S.unsqueeze(0), use_cache=False).logits[0].float()
    logprobs_S = torch.log_softmax(logits_SV[:-1], dim=-1).gather(1, ids_S[1:, None]).squeeze(1)
    trained = [i for i, weight in enumerate(tokens.loss_weights[1:]) if weight]
    return logprobs_S[torch.tensor(trained, device=device)].double()
