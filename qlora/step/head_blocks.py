"""Log-probabilities with a block of the head's rows at a time, for a head that is not on the device as a whole.

A block stays for all hidden states of the micro-batch, so that the head comes once in the forward and once in the
backward pass, however many tokens there are. Forth, of each token the logarithm of its summed exponents is carried from
block to block (Milakov & Gimelshein 2018, arXiv:1805.02867); back, a block's logits are made again and with them their
share of the gradient, added up in fp32, the last block first: it is there still. That is another order of sums than
a whole head has: a run keeps the rows of a block with which it began (`Numerics.head_block`), wherever its head is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from qlora.numerics import Numerics
from qlora.step.head_loss import scaling_of
from qlora.step.loss import TILE_ROWS, LogitsTransform

# Of a head's weight. On PCIe 4 x8 (12 GB/s) such a copy takes 5.6 ms, and 16 of them are an 8B's head.
BLOCK_BYTES, MOST_ROWS = 64 << 20, 8192
# Whose logits of one block exist at a time: with 8,192 rows 64 MiB in fp32, of which three live in the backward pass.
# Of very many tokens a part, so that there are not ever more operations; hidden states take far more then.
TILE_TOKENS, MOST_TILES = 2048, 64

_HELD_BY = "_in_blocks"  # the attribute of a head whose rows somebody sends

# First row, the weight's rows (R, D) and the bias (R,) of a block, which are there until the next one is asked for.
Block = tuple[int, Tensor, Tensor | None]


class Sender(Protocol):
    """Who has a head's rows elsewhere and sends them to `device`, `rows` at a time."""

    rows: int
    device: torch.device

    def blocks(self, back: bool = False, again: bool = False) -> Iterator[Block]:
        """All blocks in their order, or `back` from the last one. `again`: a pass back follows at once."""


def rows_of(vocabulary: int, width: int) -> int:
    """Rows of a block of a head (V, D) in 16 bit: whole tiles of a GPU's products."""
    rows = min(MOST_ROWS, BLOCK_BYTES // (2 * width)) // TILE_ROWS * TILE_ROWS
    return min(vocabulary, max(TILE_ROWS, rows))


def send_by(head: nn.Module, sender: Sender | None) -> None:
    """From now on `sender` has a head's rows; None: they are where the head is."""
    vars(head).pop(_HELD_BY, None)
    if sender is not None:
        setattr(head, _HELD_BY, sender)


def sender_of(head: nn.Module) -> Sender | None:
    found: Sender | None = vars(head).get(_HELD_BY)
    return found


def device_of(head: Any) -> torch.device:
    """Where a head is computed."""
    sender, weight = sender_of(head), head.weight
    return weight.device if sender is None else sender.device  # type: ignore[no-any-return]


def rows_of_run(head: nn.Module, run: Numerics | None) -> int:
    """Rows of a block with which a head is computed; 0: whole."""
    sender = sender_of(head)
    return sender.rows if sender is not None else (run and run.head_block) or 0


def token_logprobs(
    hidden_TD: Tensor, targets_T: Tensor, head: nn.Module, transform: LogitsTransform | None, rows: int
) -> Tensor:
    """As `loss.token_logprobs`: of targets (T,) or (T, K) in fp32, differentiable with respect to the hidden states."""
    sender, again = sender_of(head), torch.is_grad_enabled() and hidden_TD.requires_grad
    blocks, scaling = _Resident(head, rows).blocks if sender is None else sender.blocks, scaling_of(transform)
    assert scaling is not None, "a model does something else to its logits"
    targets_TK = targets_T.unsqueeze(1) if targets_T.dim() == 1 else targets_T
    logprobs_TK = _InBlocks.apply(hidden_TD, targets_TK, blocks, scaling, again)  # type: ignore[no-untyped-call]
    return logprobs_TK.view(targets_T.shape)  # type: ignore[no-any-return]


class _Resident:
    """The rows of a head that is on the device."""

    def __init__(self, head: Any, rows: int) -> None:
        self.weight, self.bias, self.rows = head.weight, head.bias, rows

    def blocks(self, back: bool = False, again: bool = False) -> Iterator[Block]:
        starts = range(0, len(self.weight), self.rows)
        for start in reversed(starts) if back else starts:
            part = slice(start, start + self.rows)
            yield start, self.weight[part], None if self.bias is None else self.bias[part]


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        targets_TK: Tensor,
        blocks: Callable[..., Iterator[Block]],
        scaling: tuple[float, float],
        again: bool,
    ) -> Tensor:
        log_total_T = hidden_TD.new_full(hidden_TD.shape[:1], float("-inf"), dtype=torch.float32)
        chosen_TK = hidden_TD.new_zeros(targets_TK.shape, dtype=torch.float32)
        for block in blocks(again=again):
            for part in _tiles(len(hidden_TD)):
                z_CR = _logits(hidden_TD[part], block, scaling)
                log_total_T[part] = torch.logaddexp(log_total_T[part], z_CR.logsumexp(dim=-1))
                at, here = _places(targets_TK[part], block)
                chosen_TK[part] = torch.where(here, z_CR.gather(1, at), chosen_TK[part])
                del z_CR
        ctx.save_for_backward(hidden_TD, targets_TK, log_total_T)
        ctx.blocks, ctx.scaling = blocks, scaling
        return chosen_TK - log_total_T[:, None]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_TK: Tensor) -> Any:
        hidden_TD, targets_TK, log_total_T = ctx.saved_tensors
        grad_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
        for block in ctx.blocks(back=True):
            for part in _tiles(len(hidden_TD)):
                z_CR = _logits(hidden_TD[part], block, ctx.scaling)
                at, here = _places(targets_TK[part], block)
                of_chosen = torch.where(here, gradient_TK[part], 0.0)
                grad_CR = _back(z_CR, log_total_T[part], gradient_TK[part].sum(1), (at, of_chosen), ctx.scaling)
                del z_CR
                grad_TD[part] += grad_CR.to(block[1].dtype) @ block[1]
                del grad_CR
        return (grad_TD.to(hidden_TD.dtype), None, None, None, None)


def _tiles(tokens: int) -> Iterator[slice]:
    size = max(TILE_TOKENS, -(-tokens // MOST_TILES))
    return (slice(start, min(tokens, start + size)) for start in range(0, tokens, size))


def _logits(hidden_CD: Tensor, block: Block, scaling: tuple[float, float]) -> Tensor:
    """Of a tile and a block, in fp32, as the model hands them on: times the factor, and capped."""
    _, weight_RD, bias_R = block
    factor, cap = scaling
    z_CR = linear(hidden_CD.to(weight_RD.dtype), weight_RD, bias_R).float()  # Mamba's layers hand on fp32
    z_CR = z_CR.mul_(factor) if factor != 1 else z_CR
    return z_CR.div_(cap).tanh_().mul_(cap) if cap else z_CR


def _places(targets_CK: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The column of each target within a block, any for those that are in another, and which are in this one."""
    first, weight_RD, _ = block
    at_CK = targets_CK - first
    return at_CK.clamp(0, len(weight_RD) - 1), (at_CK >= 0) & (at_CK < len(weight_RD))


def _back(
    z_CR: Tensor, log_total_C: Tensor, summed_C: Tensor, chosen: tuple[Tensor, Tensor], scaling: tuple[float, float]
) -> Tensor:
    """The gradient of what the product gives: of chosen logits theirs, of all the softmax times the negative sum."""
    factor, cap = scaling
    inner = 1 - (z_CR / cap).square_() if cap else None
    grad_CR = z_CR.sub_(log_total_C[:, None]).exp_().mul_(-summed_C[:, None])
    grad_CR.scatter_add_(1, *chosen)
    grad_CR = grad_CR.mul_(factor) if factor != 1 else grad_CR
    return grad_CR if inner is None else grad_CR.mul_(inner)
