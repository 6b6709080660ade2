"""How many layers are drawn: a whole period more than what stands before the first that repeats."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.memory.layer_kinds import drawn_layers, period_of
from tests.all_families import make_config as make_dense
from tests.mixtures import make_config

HYBRID = [*["linear_attention"] * 3, "full_attention"]


@pytest.mark.parametrize(
    ("family", "overrides", "sizes"),
    [
        ("qwen3_moe", {"num_hidden_layers": 12}, (3, 4)),
        ("glm4_moe", {"num_hidden_layers": 12}, (4, 5)),
        ("deepseek_v3", {"num_hidden_layers": 12, "first_k_dense_replace": 3}, (6, 7)),
        ("glm4_moe_lite", {"num_hidden_layers": 6, "mlp_layer_types": ["dense", *["sparse"] * 5]}, (4, 5)),
        (
            "qwen3_5_moe_text",
            {"num_hidden_layers": 8, "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2},
            (4, 8),
        ),
        ("lfm2_moe", {"num_hidden_layers": 9, "layer_types": ["conv", *["conv", "full_attention"] * 4]}, (5, 7)),
    ],
)
def test_mixtures_begin_behind_dense_layers(family: str, overrides: dict[str, Any], sizes: tuple[int, int]) -> None:
    assert drawn_layers(make_config(family, overrides)) == sizes


def test_dense_models_are_drawn_as_ever() -> None:
    assert drawn_layers(make_dense("llama")) == (3, 4)
    assert period_of(make_dense("gemma2")) == 2 and drawn_layers(make_dense("gemma2")) == (4, 6)
