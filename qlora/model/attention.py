"""Attention through our own registered function, so that there is one place to change it.

It is transformers' sdpa with one addition. Documents packed into a row are kept apart by a mask that transformers makes
from `position_ids` (they restart at 0 with each document); sliding windows are part of the same mask. Three things must
hold for that, and the model's caller sees to them:

* `attention_mask` is None. A 2-D mask switches the making of document masks off; a 4-D one drops sliding windows.
* `use_cache` is False. A cache switches it off as well, and a cache is the default, in training too. Gradient
  checkpointing hides that: while training it sets `use_cache=False` by itself, so that a run with it is right, and
  its evaluation, or the same run without it, is not.
* padding restarts at position 0, so that it is a document of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "qlora_sdpa"


def register() -> str:
    """Makes the function known to transformers (as often as one likes) and returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, heads, S, D) on key and value (B, kv heads, S, D); returns (B, S, heads, D).

    `settings` are what transformers' layers pass: dropout, scaling, is_causal, position_bias and others.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1 and attention_mask is not None and _shares_keys(query, settings):
        # transformers repeats keys and values for each query head as soon as there is a mask: CUDA's fused kernels
        # take masks or shared keys, not both. The CPU's takes both (forward and backward 1.7 times as fast, S = 1024).
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=settings.get("dropout", 0.0),
            scale=settings.get("scaling"),
            enable_gqa=True,
        )
        return output.transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return output, None


def _shares_keys(query: Tensor, settings: dict[str, Any]) -> bool:
    """Whether one kernel takes this query with a mask and shared keys, and nothing else is asked of it."""
    plain = settings.get("position_bias") is None and settings.get("softcap") is None and settings.get("cache") is None
    return plain and query.device.type == "cpu" and query.shape[2] > 1 and query.dtype != torch.float16
