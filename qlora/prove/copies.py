"""Micro-batches reach the device whole, while it computes and while the host makes the next ones."""

from __future__ import annotations

from dataclasses import fields

import torch

from qlora.batch import Batch
from qlora.data.ahead import in_one_block
from qlora.prove.model import packed
from qlora.prove.proof import Outcome, Place, Proof, all_equal

COUNT = 32


def run(place: Place) -> Outcome:
    busy = torch.randn(2048 if place.on_card else 64, 2048 if place.on_card else 64, device=place.device)
    wrong, placed = [], list[tuple[int, Batch]]()
    for number in range(COUNT):
        # As a step's: one block, pinned on a GPU's host, which is gone at once and whose memory the next one may get.
        placed.append((number, in_one_block(_batch(place, number), place.device).to(place.device)))
        busy = (busy @ busy).clamp_(-1, 1)
    for number, there in placed:
        if not all_equal(_tensors(there), _tensors(_batch(place, number))):
            wrong.append(number)
    said = f"{COUNT} micro-batches of {placed[0][1].tokens:,} tokens" + (f", wrong: {wrong}" if wrong else "")
    return Outcome(not wrong, said, {"micro_batches": COUNT, "wrong": len(wrong), "sum": float(busy.abs().mean())})


def _batch(place: Place, number: int) -> Batch:
    return packed(place.rows, place.length, place.shape.vocabulary, seed=number)


def _tensors(batch: Batch) -> list[torch.Tensor]:
    """What a step computes with; `host_ids_BS` stays where it was made."""
    values = [getattr(batch, field.name) for field in fields(batch) if field.name != "host_ids_BS"]
    return [value for value in values if isinstance(value, torch.Tensor)]


PROOF = Proof(
    name="copies",
    promise="what a step computes with is what the host made, though copies do not wait",
    tolerance="0: every value",
    source="batch.py; CUDA's programming guide, asynchronous copies from pinned and pageable memory",
    run=run,
)
