"""Families of Llama's kind: llama.cpp computes what transformers does, sees each fault; what it cannot is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.export.gguf.families.llama_like import FAMILIES
from tests.export.gguf.cases import LLAMA3
from tests.export.gguf.families.cases import Case, check, marked, refused
from tests.export.gguf.families.dense_cases import CASES, HALF, ROPE

# Multipliers and a permutation; heads that turn in part, biases; queries scaled by their position.
FAST = ("granite", "glm4", "ministral3")


@pytest.mark.parametrize("case", marked(CASES, FAMILIES, FAST))
def test_a_familys_file_is_the_model_and_each_fault_is_seen(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layers of smollm3"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers of smollm3"),
        ("smollm3", {"attention_bias": True}, "no place for the tensor .*bias"),
        ("smollm3", {"rope_parameters": LLAMA3}, "'llama3' positions"),
        ("smollm3", {"rope_parameters": HALF}, "8 rotated dims of 16"),
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier = 0"),
        ("granite", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("glm4", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "'llama3' positions"),
        ("glm4", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("ministral3", {"hidden_act": "gelu"}, "the activation 'gelu'"),
    ],
)
def test_what_its_graph_cannot_compute_is_refused(model_type: str, fields: dict[str, Any], message: str) -> None:
    refused(CASES, model_type, {"rope_parameters": ROPE, **fields} if model_type != "ministral3" else fields, message)
