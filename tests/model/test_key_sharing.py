"""Layers that are handed a dict to share keys and values in, and share none, are closed like any other's."""

from __future__ import annotations

from typing import Any

from qlora.model.meta_model import build_unmatched
from qlora.step.layerwise import recomputable
from tests import mixtures

SHARING = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}


def model_of(family: str, **overrides: Any) -> Any:
    return build_unmatched(mixtures.make_config(family, overrides), "eager", family)


def test_without_a_layer_that_takes_them_none_keeps_its_keys() -> None:
    model = model_of("gemma4_text", num_kv_shared_layers=0, num_hidden_layers=3, layer_types=SHARING["layer_types"][:3])
    layers = recomputable(model)
    assert layers and not any(layer.self_attn.store_full_length_kv for layer in layers)
    assert all(layer._unread_inputs == ("shared_kv_states",) for layer in layers)


def test_where_one_takes_anothers_everything_stays() -> None:
    model = model_of("gemma4_text", **SHARING)
    layers = recomputable(model)
    assert any(layer.self_attn.store_full_length_kv for layer in layers)
    assert not any(hasattr(layer, "_unread_inputs") for layer in layers)
