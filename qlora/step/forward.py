"""What one micro-batch does: embed, run the layers, ask the head for the trained tokens, go back.

Works on real tensors for the trainer and on meta tensors for the estimator; reads nothing back to the host. Two things
a reader would question: the head is called by us and not by the model (see `loss.py`), and attention_mask is always
None with use_cache False, because only then does transformers isolate packed documents by their positions
(qlora/README.md, packed documents).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora import numerics
from qlora.batch import Batch
from qlora.device import is_card
from qlora.forward_facts import in_forward
from qlora.step import head_blocks, head_loss
from qlora.step.loss import LogitsTransform, Objective, chunk_tokens, logits_transform, token_logprobs


@dataclass(frozen=True)
class CausalParts:
    """The parts of a causal language model that a step uses; they share their weights with the whole."""

    trunk: nn.Module
    embedding: nn.Module
    head: nn.Module
    transform: LogitsTransform | None
    chunk_tokens: int
    loss_chunk: int = 0  # tokens whose loss comes with its gradient (`head_loss`); 0: the head is asked again for it
    head_block: int = 0  # rows of the head that are there at a time (`head_blocks`); 0: all of them

    @classmethod
    def of(cls, causal_lm: Any, on_card: bool | None = None) -> CausalParts:
        """Take a transformers causal LM apart (the model inside a PEFT wrapper: `peft_model.get_base_model()`).
        `on_card`: a GPU computes; None: where the weights are. A run keeps the pieces of the head that it began with.
        """
        head, run = causal_lm.get_output_embeddings(), numerics.of_run()
        on_card = is_card(head_blocks.device_of(head)) if on_card is None else on_card
        config, block = causal_lm.config.get_text_config(), head_blocks.rows_of_run(head, run)
        return cls(
            trunk=causal_lm.base_model,
            embedding=causal_lm.get_input_embeddings(),
            head=head,
            transform=logits_transform(config),
            chunk_tokens=(run and run.head_chunk) or chunk_tokens(config.vocab_size, on_card),
            loss_chunk=0 if block else (run and run.loss_chunk) or 0,
            head_block=block,
        )


def hidden_states(parts: CausalParts, batch: Batch, neftune_alpha: float = 0.0) -> Tensor:
    """The trunk's last hidden states (B, S, D), documents isolated from each other."""
    common = {"position_ids": batch.position_ids_BS, "attention_mask": None, "use_cache": False}
    with in_forward(batch):
        if neftune_alpha > 0:
            embeds_BSD = parts.embedding(batch.input_ids_BS)
            output = parts.trunk(inputs_embeds=embeds_BSD + neftune_noise(embeds_BSD, batch, neftune_alpha), **common)
        else:
            output = parts.trunk(input_ids=batch.input_ids_BS, **common)
    return output.last_hidden_state  # type: ignore[no-any-return]


def neftune_noise(embeds_BSD: Tensor, batch: Batch, alpha: float) -> Tensor:
    """Uniform noise of magnitude alpha / sqrt(L·D), L the length of the token's own document.

    NEFTune (Jain et al. 2023, algorithm 1). In a pack each document gets the noise that it would get alone.
    """
    ids_BS = batch.document_ids_BS
    ones_BS = torch.ones_like(ids_BS, dtype=embeds_BSD.dtype)
    counts_BS = torch.zeros_like(ones_BS, dtype=torch.float32).scatter_add_(1, ids_BS, ones_BS.float())
    lengths_BS = counts_BS.gather(1, ids_BS)
    magnitude_BS = alpha / torch.sqrt(lengths_BS * embeds_BSD.shape[-1])
    noise_BSD = torch.empty_like(embeds_BSD).uniform_(-1, 1)
    return noise_BSD * magnitude_BS.unsqueeze(-1).to(embeds_BSD.dtype)


def batch_logprobs(parts: CausalParts, batch: Batch, neftune_alpha: float = 0.0) -> Tensor:
    """Log-probabilities (T,) of the trained targets of a micro-batch, in the order of `batch.trained_T`; (T, K) of the
    tokens of its labels where it has some."""
    hidden_TD, targets_T = _trained(parts, batch, neftune_alpha)
    asked = (hidden_TD, targets_T if batch.label_ids_TK is None else batch.label_ids_TK, parts.head, parts.transform)
    if parts.head_block:
        return head_blocks.token_logprobs(*asked, parts.head_block)
    return token_logprobs(*asked, parts.chunk_tokens)


def _trained(parts: CausalParts, batch: Batch, neftune_alpha: float) -> tuple[Tensor, Tensor]:
    """Hidden states (T, D) and targets (T,) of the trained places."""
    hidden_BSD = hidden_states(parts, batch, neftune_alpha)
    picked = (one.index_select(0, batch.trained_T) for one in (hidden_BSD.flatten(0, 1), batch.targets_BS.flatten()))
    return tuple(picked)  # type: ignore[return-value]


def batch_loss(parts: CausalParts, batch: Batch, objective: Objective, neftune_alpha: float = 0.0) -> Tensor:
    """Summed loss of a micro-batch, as the objective has it: a scalar fp32 tensor."""
    return objective.loss(batch_logprobs(parts, batch, neftune_alpha), batch)


def forward_backward(
    parts: CausalParts, batch: Batch, objective: Objective, step_weight: float, neftune_alpha: float = 0.0
) -> Tensor:
    """Add a micro-batch's share of the step's gradient; returns its summed loss, detached, still on the device.

    `step_weight` is the sum of the objective's weights over all micro-batches of the step (qlora/README.md,
    token-weighted accumulation).
    """
    head = head_loss.head_of(parts.head, parts.transform) if parts.loss_chunk else None
    weights_T = head_loss.weights_of(objective, batch) if head is not None else None
    if head is not None and weights_T is not None:
        # Hidden states have no name here: going back through the layers, nobody needs them.
        share, loss = head_loss.share_and_loss(
            *_trained(parts, batch, neftune_alpha), weights_T, step_weight, head, parts.loss_chunk
        )
        share.backward()  # type: ignore[no-untyped-call]
        return loss
    loss = batch_loss(parts, batch, objective, neftune_alpha)
    (loss / step_weight).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, dropout off; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def seed_micro_batch(seed: int, step: int, micro_step: int) -> None:
    """Seed what dropout and NEFTune draw, by the recipe and the place in the run: a resumed run draws the same numbers,
    a replayed step too, and nothing random is saved for it."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
