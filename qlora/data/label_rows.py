"""Labels that are probabilities, from where rows have them to the tensors of a micro-batch.

A row with labels has K of them for each of its trained tokens, in their order (`token_cache.RowLabels`). In one
micro-batch with it, any other row's tokens are labels as well, of probability 1: one loss does for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch

from qlora.data.token_cache import PreparedSplit


class BatchLabels(TypedDict, total=False):
    label_ids_TK: torch.Tensor
    label_logprobs_TK: torch.Tensor


def collated(split: PreparedSplit, packs: Sequence[tuple[int, ...]], targets_T: torch.Tensor) -> BatchLabels:
    """The labels of a micro-batch's trained tokens, in the order of `trained_T`; nothing where no row has any.

    Raises ValueError where a row has labels for another number of tokens than it trains.
    """
    if split.labels is None:
        return {}
    rows = [row for members in packs for row in members]
    found = [split.labels(row) for row in rows]
    places = max((labels.ids.shape[1] for labels in found if labels is not None), default=0)
    if not places:
        return {}
    ids_TK = targets_T.unsqueeze(1).repeat(1, places)  # any token does where nothing is
    logprobs_TK = torch.full(ids_TK.shape, -torch.inf)
    logprobs_TK[:, 0] = 0.0
    start = 0
    for row, labels in zip(rows, found, strict=True):
        end = start + split.trained[row]
        if labels is not None:
            if len(labels.ids) != end - start:
                raise ValueError(f"{split.wheres[row]}: labels of {len(labels.ids)} tokens for {end - start}")
            ids = torch.tensor(labels.ids, dtype=torch.int64)
            logprobs = torch.tensor(labels.logprobs, dtype=torch.float32)
            known = (ids >= 0) & logprobs.isfinite()
            wide = ids.shape[1]
            ids_TK[start:end, :wide] = torch.where(known, ids, ids_TK[start:end, :wide])
            logprobs_TK[start:end, :wide] = torch.where(known, logprobs, -torch.inf)
        start = end
    return {"label_ids_TK": ids_TK, "label_logprobs_TK": logprobs_TK}
