"""Families whose layers may share keys and values, where no layer of a model does: each of them is closed then.

Gemma 3n and 4 hand one dict to all layers. The last layer of each kind that computes keys and values puts them into it,
also where no layer takes them out (transformers 5.24, `kv_sharing_modes`: an assistant beside the model may), as in
Gemma 4 26B-A4B (`num_kv_shared_layers` 0). Here nobody asks for them: they are not kept, which would be two layers'
keys and values with the graphs behind them, and the dict is no input that ties layers to each other.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora.layer_partners import let_unread

_DICT = "shared_kv_states"


def settle(model: nn.Module) -> None:
    """Have the layers of a model that share nothing say so; where one takes another's, nothing is changed."""
    attentions = [module for module in model.modules() if hasattr(module, "store_full_length_kv")]
    if not attentions or any(getattr(module, "is_kv_shared_layer", True) for module in attentions):
        return
    ours = set(map(id, attentions))
    for layer in model.modules():
        if any(id(child) in ours for child in layer.children()):
            let_unread(layer, _DICT)
    for module in attentions:
        _forget(module)


def _forget(attention: Any) -> None:
    attention.store_full_length_kv = False
