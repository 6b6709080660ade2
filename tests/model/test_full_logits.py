"""The model's own log-probabilities of a row."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from qlora.model import full_logits


def test_of_each_next_token() -> None:
    table_VV = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)).bfloat16()

    def causal_lm(input_ids: Any, use_cache: bool) -> Any:
        assert not use_cache and input_ids.shape == (1, 5)
        return SimpleNamespace(logits=table_VV[input_ids])

    ids_S = torch.tensor([3, 1, 4, 1, 5])
    found_S = full_logits.logprobs(causal_lm, ids_S)
    wanted = [float(torch.log_softmax(table_VV[a].float(), 0)[b]) for a, b in pairwise(ids_S)]
    assert found_S.dtype == torch.float32 and found_S.tolist() == wanted
