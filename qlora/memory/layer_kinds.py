"""Which layers of a model are alike: after how many they repeat, and how many of another kind stand before the first.

Models are drawn in two sizes and extended layer by layer, so that what is added must be a whole period of what repeats.
Mixtures of experts begin with dense layers in many families (one in GLM-4.7-Flash, three in DeepSeek V3).
"""

from __future__ import annotations

from typing import Any

# From three layers on every phase grows by the same bytes a layer (tests/memory/test_simulate.py); with two, there is
# none between the first and the last layer of the backward pass.
FEWEST_LAYERS = 3
_LEADING_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def period_of(text: Any) -> int:
    """After how many layers the kinds of layers repeat: 1 for most, 2 for Gemma 2, 6 for Gemma 3."""
    kinds = _kinds(text)[_leading(text) :]
    return next((period for period in range(1, len(kinds)) if kinds[period:] == kinds[:-period]), 1)


def drawn_layers(text: Any) -> tuple[int, int]:
    """The two numbers of layers that a model is drawn with, a period apart."""
    period = period_of(text)
    first = _leading(text) + -(-FEWEST_LAYERS // period) * period
    return first, first + period


def _kinds(text: Any) -> list[tuple[Any, ...]]:
    """Of each layer what tells it from others, as lists of the configuration have it."""
    lists = [getattr(text, name, None) for name in ("layer_types", "mlp_layer_types")]
    return list(zip(*filter(None, lists), strict=False))


def _leading(text: Any) -> int:
    """How many dense layers stand before the first with experts."""
    kinds = getattr(text, "mlp_layer_types", None)
    if kinds and "sparse" in kinds:
        return int(kinds.index("sparse"))
    found = (getattr(text, name, None) for name in _LEADING_DENSE)
    return next((count for count in found if type(count) is int and count < text.num_hidden_layers), 0)
